package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
)

// A generation is one set of programs and maps, pinned below the tracker's directory in one
// of its own: an upgrade builds the next one beside it. The newest that has its meta pin is the
// tracker. The devices' directories belong to no generation.

const (
	pinMeta          = "meta"
	generationPrefix = "gen-"
)

// pin is where the tracker's generation pins what is called name.
func (t *Tracker) pin(name string) string {
	return filepath.Join(t.dir, generationPrefix+strconv.FormatUint(t.gen, 10), name)
}

// generations lists what is there, oldest first.
func generations(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []uint64
	for _, e := range entries {
		if n, ok := strings.CutPrefix(e.Name(), generationPrefix); ok {
			if g, err := strconv.ParseUint(n, 10, 64); err == nil && g > 0 {
				all = append(all, g)
			}
		}
	}
	slices.Sort(all)
	return all, nil
}

func (t *Tracker) published() bool {
	_, err := os.Lstat(t.pin(pinMeta))
	return err == nil
}

// superseded tells whether another tracker has taken the place of the one that was adopted.
// If it can't be found out, it is.
func (t *Tracker) superseded() bool {
	gens, err := generations(t.dir)
	if err != nil {
		return true
	}
	for _, g := range gens {
		if g > t.gen && (&Tracker{dir: t.dir, gen: g}).published() {
			return true
		}
	}
	return t.replacedInPlace()
}

// replacedInPlace tells whether a tracker that was attached anew uses the same pins.
func (t *Tracker) replacedInPlace() bool {
	m, err := ebpf.LoadPinnedMap(t.pin(pinMeta), nil)
	if err != nil {
		return true
	}
	defer func() { _ = m.Close() }()
	words, err := mapArray(m)
	if err != nil {
		return true
	}
	defer words.close()
	return len(words.words) <= metaInstance || words.words[metaInstance] != t.instance
}

// adopt takes over the newest generation that is complete, clears away one that was never
// completed, and finishes the upgrade that a killed process began.
func (t *Tracker) adopt() error {
	if _, err := os.Lstat(filepath.Join(t.dir, pinMeta)); err == nil {
		return notAdoptable("the pinned tracker has another map layout")
	}
	gens, err := generations(t.dir)
	if err != nil {
		return err
	}
	if len(gens) == 0 {
		return notAdoptable("no tracker was attached")
	}
	newest := -1
	for i, g := range gens {
		if t.gen = g; t.published() {
			newest = i
		}
	}
	if newest < 0 {
		return notAdoptable("the attaching of the pinned tracker was interrupted")
	}
	detached := true
	for _, g := range gens[newest+1:] {
		t.gen = g
		done, err := t.unpin()
		if err != nil {
			return err
		}
		detached = detached && done
	}
	t.gen = gens[newest]
	if err := t.load(); err != nil {
		return err
	}
	for _, g := range gens[:newest] {
		done, err := t.finishUpgrade(g)
		if err != nil {
			return err
		}
		detached = detached && done
	}
	// Of a process that died while it attached or detached, or did not see the end of that.
	if detached {
		t.endHookChange()
	}
	if newest > 0 {
		return t.sweep()
	}
	return nil
}

// unpin detaches the programs of the tracker's generation, as far as no process holds them, and
// tells whether those for image files are.
func (t *Tracker) unpin() (detached bool, err error) {
	detached, err = unpinHooks(t.pin("files-*/link-*"), detachLimit, func() error { return os.RemoveAll(t.pin("")) })
	if err != nil {
		return false, fmt.Errorf("unpin generation %d: %w", t.gen, err)
	}
	return detached, nil
}

// finishUpgrade ends what is left of generation g, which the tracker has replaced. It tells whether
// the programs for image files are detached.
func (t *Tracker) finishUpgrade(g uint64) (detached bool, err error) {
	old := newTracker(t.options, g)
	defer old.closeAll()
	err = old.load()
	var not notAdoptable
	switch {
	case err == nil:
		return old.retire()
	case errors.As(err, &not), errors.Is(err, os.ErrNotExist):
		// Whatever it left open is closed as lost when its device is acquired.
		return old.unpin()
	}
	return false, err
}

// putText writes as much of s as fits, and a zero.
func putText(words []uint64, s string) {
	room := len(words)*8 - 1
	b := []byte(s)[:min(len(s), room)]
	for i, c := range b {
		words[i/8] |= uint64(c) << (i % 8 * 8)
	}
}

func textOf(words []uint64) string {
	var b []byte
	for i := range len(words) * 8 {
		c := byte(words[i/8] >> (i % 8 * 8))
		if c == 0 {
			break
		}
		b = append(b, c)
	}
	return strings.ToValidUTF8(string(b), "?")
}
