package bpf

import (
	"fmt"
	"time"
)

// firstCopies is how many copies of each program a tracker begins with. Each costs every write, so where
// calls are whole it is one, until it nests with itself. Where they are not, misses are frequent and
// programs can't be replaced: it has to be all.
func firstCopies(o Options, whole bool) int {
	switch {
	case o.Copies != 0:
		return o.Copies
	case whole:
		return 1
	}
	return copies
}

// Copies are attached of each program: the first ones in the order of [Misses].
func (t *Tracker) Copies() int { return t.copies }

// Grown says why more than one copy of each program came to be attached, or is empty.
func (t *Tracker) Grown() string { return t.grown }

// each calls f for every program that is attached, until it returns false.
func (t *Tracker) each(f func(i int) bool) {
	for i := range len(programs) * copies {
		if i%copies < t.copies && !f(i) {
			return
		}
	}
}

// Attached are the counts of the copies that are attached, in the order of [Misses].
func (t *Tracker) Attached(m Misses) []uint64 {
	var out []uint64
	t.each(func(i int) bool { out = append(out, m[i]); return true })
	return out
}

// fill makes the copies that are not attached count as the first did, so that they never vouch
// for an event: not in an epoch's least count, and not when epochs of different trackers are merged.
func (m *Misses) fill(attached int) {
	for i := range m {
		if i%copies >= attached {
			m[i] = m[i/copies*copies]
		}
	}
}

// grow finds out how many copies there should be instead of t.copies, and why. A tracker never goes
// back to fewer: what nested once will nest again.
func (t *Tracker) grow() (n int, why string, err error) {
	n = max(t.copies, t.options.Copies)
	if n > t.copies || n == copies || t.options.Copies != 0 {
		return n, t.grown, nil
	}
	missed, err := t.Misses()
	if err != nil {
		return n, "", err
	}
	for p, name := range programs {
		if m := missed[p*copies]; m > 0 {
			return copies, fmt.Sprintf("%d copies of each tracking program since %s: the only one of %s had missed %d events",
				copies, time.Now().UTC().Format(time.RFC3339), name, m), nil
		}
	}
	return n, t.grown, nil
}
