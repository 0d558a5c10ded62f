package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// generation is one object of a pack.
type generation struct {
	number uint32
	x      *packIndex // nil: it is damaged
}

// generations returns all objects of a pack, ascending. known is false if one of them is not to be judged.
func (c *repairing) generations(ctx context.Context, id PackID) (all []generation, known bool, err error) {
	var numbers []uint32
	for p, err := range c.repo.packObjects(ctx, packName(id)) {
		if err != nil {
			return nil, false, err
		}
		if p.Pack == id {
			numbers = append(numbers, p.Generation)
		}
	}
	slices.Sort(numbers)
	for _, n := range numbers {
		x, err := c.r.loadGeneration(ctx, id, n)
		switch {
		case errors.Is(err, ErrNotFound):
			continue
		case errors.Is(err, ErrVersion):
			return nil, false, nil
		case errors.Is(err, ErrCorrupt):
			if newer, err := c.ofNewerKeys(ctx, packObject(id, n)); newer || err != nil {
				return nil, false, err
			}
		case err != nil:
			return nil, false, err
		}
		all = append(all, generation{n, x})
	}
	return all, true, nil
}

// ofNewerKeys tells whether an object seems to be sealed with keys that are not known here: then it
// may be good.
func (c *repairing) ofNewerKeys(ctx context.Context, object string) (bool, error) {
	if c.r.keys == nil {
		return false, nil
	}
	head, err := c.r.readHead(ctx, object)
	if err != nil {
		if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNotFound) {
			return false, nil
		}
		return false, err
	}
	return string(head[:8]) == packMagic && packKeys(head) > c.r.keys.newest().number, nil
}

// pack heals the wounds of one pack, and tells whether that was anything.
//
// The new generation is durable, and was read back, before anything goes. It holds all that the newest generation with
// a whole index did.
func (c *repairing) pack(ctx context.Context, id PackID, wounds map[uint32]*wound, from map[Hash][]source) (bool, error) {
	all, known, err := c.generations(ctx, id)
	if err != nil || !known {
		return false, err
	}
	newest, base := uint32(1), generation{} // a pack that is gone gets no name that it had
	for _, g := range all {
		newest = max(newest, g.number)
		if g.x != nil {
			base = g
		}
	}
	b := mending{c: c, id: id, base: base, wounds: maps.Clone(wounds), content: map[uint32][]byte{}}
	there := 0 // in the newest one already
	for ord, w := range wounds {
		if base.x != nil && base.x.kind == w.kind {
			_, err := c.read(ctx, base.x, ord, w.hash, w.kind)
			if err == nil {
				w.healed = len(all) > 1
				there++
				continue
			}
			if !errors.Is(err, ErrCorrupt) {
				return false, err
			}
		}
		raw, err := c.get(ctx, w, from[w.hash])
		if err != nil {
			return false, err
		}
		if raw != nil && b.takes(ord, w, raw) {
			b.content[ord], b.kind = raw, w.kind
			w.healed = true
		}
	}
	healed := len(b.content)
	if ok, err := b.carry(ctx, all); !ok {
		for _, w := range wounds {
			w.healed = false
		}
		return false, err
	}
	report := PackRepair{Pack: id, Object: packObject(id, newest), Healed: healed, Lost: len(wounds) - healed - there}
	// Readers may still be led to an older generation, without what is in the newest.
	finish := there > 0 && len(all) > 1
	if healed == 0 && !finish {
		return false, nil
	}
	write := len(b.content) > 0 || base.number != newest
	if write {
		report.Object = packObject(id, newest+1)
	}
	if c.o.DryRun {
		c.did(report)
		return true, nil
	}
	upTo := newest
	if write {
		doc, partial, err := b.build(ctx)
		if err != nil {
			return false, err
		}
		if report.Kept, err = c.keep(ctx, id, all, partial); err != nil {
			return false, err
		}
		upTo = newest + 1
		if err := c.repo.blobs.Put(ctx, packObject(id, upTo), bytes.NewReader(doc), int64(len(doc))); err != nil {
			if errors.Is(err, ErrExists) {
				return true, nil // a garbage collection was faster: look again
			}
			return false, err
		}
		if err := c.readBack(ctx, packAt{id, upTo}, b.wounds, b.content); err != nil {
			return false, err
		}
	}
	for _, g := range all {
		if g.number < upTo {
			if err := c.repo.removed(ctx, packObject(id, g.number)); err != nil {
				return false, err
			}
		}
	}
	c.did(report)
	return true, nil
}

// did adds to the report what was done to a pack, perhaps in another round already.
func (c *repairing) did(p PackRepair) {
	i := slices.IndexFunc(c.report.Packs, func(q PackRepair) bool { return q.Pack == p.Pack })
	if i < 0 {
		c.report.Packs = append(c.report.Packs, p)
		return
	}
	q := &c.report.Packs[i]
	q.Object, q.Healed, q.Lost, q.Kept = p.Object, q.Healed+p.Healed, p.Lost, append(q.Kept, p.Kept...)
}

// readBack makes sure that what was healed can be read; else the object goes again.
func (c *repairing) readBack(ctx context.Context, at packAt, wounds map[uint32]*wound, content map[uint32][]byte) error {
	x, err := c.r.loadGeneration(ctx, at.Pack, at.Generation)
	for ord := range content {
		if err == nil {
			_, err = c.read(ctx, x, ord, wounds[ord].hash, wounds[ord].kind)
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("the repaired pack is not what was written: %w", err), c.repo.removed(ctx, at.object()))
	}
	return nil
}

// salvagePrefix is where objects are kept that were replaced although something in them may be what is lost.
const salvagePrefix = "salvage/"

// keep copies the objects of a pack whose index is damaged, and all of them if the new one lacks records
// that are in them.
func (c *repairing) keep(ctx context.Context, id PackID, all []generation, partial bool) (kept []string, err error) {
	if c.o.DiscardDamaged {
		return nil, nil
	}
	for _, g := range all {
		if g.x != nil && !partial {
			continue
		}
		name := packObject(id, g.number)
		p, err := readSmall(ctx, c.repo.blobs, name, maxPackLen+maxSealedIndex+packFooterLen)
		if err != nil {
			return nil, err
		}
		h := plainHasher.sum(p)
		to := fmt.Sprintf("%s%s.%d-%x", salvagePrefix, id, g.number, h[:8])
		err = c.repo.blobs.Put(ctx, to, bytes.NewReader(p), int64(len(p)))
		if err != nil && !errors.Is(err, ErrExists) {
			return nil, fmt.Errorf("keep %s: %w", name, err)
		}
		kept = append(kept, to)
	}
	return kept, nil
}
