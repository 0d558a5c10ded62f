package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/tidemark/tidemark/store/blob"
)

// RepairOptions say how a repair works. The zero value is usual.
type RepairOptions struct {
	// Quick does not read the grains of points that are not known to be damaged: only maps and indexes.
	Quick bool
	// DryRun changes nothing and reports what could be healed, as far as can be told without doing it.
	DryRun bool
	// DiscardDamaged deletes objects that are replaced although something in them may be what is lost. Else they
	// are kept below salvage/.
	DiscardDamaged bool
	// Progress is called from one goroutine at a time. May be nil.
	Progress func(phase string, done, total int64)
}

// RepairReport says what was found and done.
type RepairReport struct {
	DryRun bool          `json:"dry_run"`
	Points []PointRepair `json:"points"`
	Packs  []PackRepair  `json:"packs,omitempty"` // that were healed, wholly or in part
}

// PointRepair is what was found of a point.
type PointRepair struct {
	Point  PointName `json:"point"`
	Damage int64     `json:"damage"`         // bytes that could not be read when it was looked at first
	Lost   []Lost    `json:"lost,omitempty"` // and still can't
	found  bool
}

// Damaged tells whether anything was found.
func (p *PointRepair) Damaged() bool { return p.found }

// PackRepair is a pack of which records were healed.
type PackRepair struct {
	Pack   PackID   `json:"pack"`
	Object string   `json:"object"` // that holds it now, or would
	Healed int      `json:"healed"` // records
	Lost   int      `json:"lost"`   // records that are needed and have no good copy
	Kept   []string `json:"kept,omitempty"`
}

// Lost tells whether anything is lost for good, or until a later repair.
func (r *RepairReport) Lost() bool {
	return slices.ContainsFunc(r.Points, func(p PointRepair) bool { return len(p.Lost) > 0 })
}

// Repair verifies points, heals what has a good copy anywhere in the repository, and notes what
// has none: see [Repo.Damages]. A good copy is a record of the same kind and hash whose content was read and
// checked. It replaces the damaged one in a new generation of its pack, so that all points that share it
// are healed, whether they are named or not. What was good in a pack stays as it is.
//
// It runs beside backups and readers; the error wraps ErrLocked if a garbage collection or another repair runs,
// and ErrWriterKey if the key can't read content. Whatever fails otherwise than by damage ends it: what can't be
// read now may be read later, and nothing is decided on it. Killed at any moment, it leaves no point worse than it
// was, and the next one goes on. Memory: two packs, and the content that is healed in one.
func (r *Repo) Repair(ctx context.Context, names []PointName, o RepairOptions) (_ RepairReport, err error) {
	if err := r.CanRead(); err != nil {
		return RepairReport{}, fmt.Errorf("repair: %w", err)
	}
	if o.Progress == nil {
		o.Progress = func(string, int64, int64) {}
	}
	c := &repairing{repo: r, o: o, good: newMarks(), noted: map[PointName]bool{}, report: RepairReport{DryRun: o.DryRun, Points: []PointRepair{}}}
	if l, ok := r.blobs.(blob.Locker); ok && !o.DryRun {
		unlock, err := l.Lock(ctx, "gc")
		if err != nil {
			return c.report, fmt.Errorf("repair: %w", err)
		}
		defer func() { err = errors.Join(err, unlock()) }()
	}
	if err := c.run(ctx, names); err != nil {
		return c.report, fmt.Errorf("repair: %w", err)
	}
	return c.report, nil
}

// repairing is one run of a repair.
type repairing struct {
	repo   *Repo
	o      RepairOptions
	r      *reader // of this round: nothing cached of before
	good   *marks  // grains that were read and are good; they stay so
	noted  map[PointName]bool
	report RepairReport

	indexes map[packAt]*packIndex // of sources: at most maxIndexes
}

// maxIndexes bounds the indexes of sources that are kept: at most 3.4 MiB each, usually some 40 KiB.
const maxIndexes = 16

// index returns the index of an object that records are taken from.
func (c *repairing) index(ctx context.Context, at packAt) (*packIndex, error) {
	if x := c.indexes[at]; x != nil {
		return x, nil
	}
	x, err := c.r.loadGeneration(ctx, at.Pack, at.Generation)
	if err != nil {
		return nil, err
	}
	if c.indexes == nil || len(c.indexes) >= maxIndexes {
		c.indexes = map[packAt]*packIndex{}
	}
	c.indexes[at] = x
	return x, nil
}

// maxRounds is how often is verified and healed: a node that is healed may lead to more damage.
const maxRounds = maxLevel + 3

func (c *repairing) run(ctx context.Context, names []PointName) (err error) {
	if err := c.tidy(ctx, names); err != nil {
		return err
	}
	found := make([][]missed, 0, len(names))
	points := make([]PointName, 0, len(names))
	for round := 0; ; round++ {
		if c.r, err = newReader(c.repo.blobs, c.repo.repo, c.repo.codec, c.repo.keys); err != nil {
			return err
		}
		if round == 0 {
			for _, n := range names {
				m, err := c.check(ctx, n)
				if errors.Is(err, ErrNotFound) {
					continue // forgotten since it was listed
				}
				if err != nil {
					return err
				}
				points, found = append(points, n), append(found, m)
				c.report.Points = append(c.report.Points, PointRepair{Point: n, Damage: bytesOf(m), found: len(m) > 0})
			}
		} else {
			for i, n := range points {
				if len(found[i]) == 0 {
					continue
				}
				m, err := c.check(ctx, n)
				if err != nil && !errors.Is(err, ErrNotFound) {
					return err
				}
				found[i] = m
			}
		}
		wounds := woundsOf(found)
		if len(wounds) == 0 || round == maxRounds {
			break
		}
		progress, err := c.heal(ctx, wounds)
		if err != nil {
			return err
		}
		if c.o.DryRun {
			for i := range found {
				found[i] = slices.DeleteFunc(found[i], func(m missed) bool { return wounds[m.ref.Pack][m.ref.Ord].healed })
			}
		}
		if !progress || c.o.DryRun {
			break
		}
	}
	for i, n := range points {
		d := newDamage(found[i])
		c.report.Points[i].Lost = d.Lost
		if c.o.DryRun {
			continue
		}
		if err := c.repo.noteDamage(ctx, n, d); err != nil {
			return fmt.Errorf("note what is lost of %s: %w", n, err)
		}
	}
	return nil
}

// tidy finds out what is noted of the points' VMs, and drops notes whose point is gone.
func (c *repairing) tidy(ctx context.Context, names []PointName) error {
	seen := map[string]bool{}
	for _, n := range names {
		if seen[n.VM] {
			continue
		}
		seen[n.VM] = true
		look := c.repo.dropStaleDamage
		if c.o.DryRun {
			look = c.repo.damageObjects
		}
		noted, err := look(ctx, damagePrefix+c.repo.folder(n.VM)+"/")
		if err != nil {
			return err
		}
		for p := range noted {
			c.noted[p] = true
		}
	}
	return nil
}

func bytesOf(m []missed) (n int64) {
	for _, x := range m {
		n += x.n
	}
	return n
}

// check returns all of a point that can't be read. Points that are noted are read in full: only so
// a note may go.
func (c *repairing) check(ctx context.Context, n PointName) (found []missed, err error) {
	p, err := c.repo.Point(ctx, n)
	var corrupt *CorruptError
	switch {
	case errors.As(err, &corrupt):
		return []missed{{object: corrupt.Object, what: corrupt.What}}, nil
	case err != nil:
		return nil, err
	}
	v := &verifier{
		r: c.r, full: !c.o.Quick || c.noted[n], known: c.good, packs: map[PackID]struct{}{},
		missed:   func(m missed) error { found = append(found, m); return nil },
		progress: func(done, total int64) { c.o.Progress("verifying "+n.String(), done, total) },
	}
	for i := range p.Disks {
		v.total += p.Disks[i].Root.Size
	}
	for i := range p.Disks {
		if err := v.disk(ctx, &p.Disks[i]); err != nil {
			return nil, fmt.Errorf("verify %s: %w", n, err)
		}
	}
	for _, q := range v.report.Problems { // what no record is to blame for
		found = append(found, missed{object: q.Object, disk: q.Disk, off: q.Off, n: q.Len, what: q.What})
	}
	return found, nil
}

// wound is a record that is needed and can't be read.
type wound struct {
	hash   Hash
	kind   packKind
	raw    uint32 // as in missed
	healed bool
}

func woundsOf(found [][]missed) map[PackID]map[uint32]*wound {
	out := map[PackID]map[uint32]*wound{}
	for _, ms := range found {
		for _, m := range ms {
			if m.ref.IsZero() {
				continue
			}
			if out[m.ref.Pack] == nil {
				out[m.ref.Pack] = map[uint32]*wound{}
			}
			out[m.ref.Pack][m.ref.Ord] = &wound{hash: m.ref.Hash, kind: m.kind, raw: m.raw}
		}
	}
	return out
}

// source is where a record may be had from.
type source struct {
	at  packAt
	ord uint32
}

// heal heals what it can and tells whether that was anything.
func (c *repairing) heal(ctx context.Context, wounds map[PackID]map[uint32]*wound) (progress bool, err error) {
	s, err := c.sources(ctx, wounds)
	if err != nil {
		return false, err
	}
	ids := make([]PackID, 0, len(wounds))
	for id := range wounds {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b PackID) int { return bytes.Compare(a[:], b[:]) })
	for i, id := range ids {
		c.o.Progress("healing packs", int64(i), int64(len(ids)))
		did, err := c.pack(ctx, id, wounds[id], s)
		if err != nil {
			return progress, fmt.Errorf("pack %s: %w", id, err)
		}
		progress = progress || did
	}
	return progress, nil
}

// sources looks in the indexes of all packs, of all their generations, for what has a hash that is missed.
func (c *repairing) sources(ctx context.Context, wounds map[PackID]map[uint32]*wound) (map[Hash][]source, error) {
	wanted := map[Hash][]source{}
	for _, w := range wounds {
		for _, x := range w {
			wanted[x.hash] = nil
		}
	}
	var packs []packAt
	for p, err := range c.repo.packObjects(ctx, packPrefix) {
		if err != nil {
			return nil, err
		}
		packs = append(packs, p.packAt)
	}
	for i, at := range packs {
		c.o.Progress("looking for good copies", int64(i), int64(len(packs)))
		x, err := c.r.loadGeneration(ctx, at.Pack, at.Generation)
		switch {
		case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion), errors.Is(err, ErrNotFound):
			continue
		case err != nil:
			return nil, err
		}
		for ord := range uint32(x.count()) {
			e, _ := x.entry(ord)
			if at, ok := wanted[e.hash]; ok && !e.absent() {
				wanted[e.hash] = append(at, source{packs[i], ord})
			}
		}
	}
	return wanted, nil
}

// get returns the content of w from the first source that is good, or nil.
func (c *repairing) get(ctx context.Context, w *wound, from []source) ([]byte, error) {
	for _, s := range from {
		x, err := c.index(ctx, s.at)
		if err == nil {
			var raw []byte
			if raw, err = c.read(ctx, x, s.ord, w.hash, w.kind); err == nil {
				return raw, nil
			}
		}
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	return nil, nil
}

// read returns the content of a record of x, checked.
func (c *repairing) read(ctx context.Context, x *packIndex, ord uint32, h Hash, kind packKind) ([]byte, error) {
	ref := Ref{Hash: h, Pack: x.pack, Ord: ord}
	e, err := x.locate(ref, kind)
	if err != nil {
		return nil, err
	}
	raw := make([]byte, e.raw)
	return raw, c.r.readEntry(ctx, x, ref, e, raw)
}
