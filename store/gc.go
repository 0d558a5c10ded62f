package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/store/blob"
)

// GCOptions say how a garbage collection works. The zero value is usual.
type GCOptions struct {
	// DryRun changes nothing and reports what is garbage now.
	DryRun bool

	// Garbage is the part of a pack's bytes that must be dead before it is
	// compacted, from 0 to 1; DefaultGarbage if 0. A pack that is all dead is
	// deleted in any case.
	Garbage float64

	// Patience gives backups up that are older, whether they run or not: they fail
	// when they commit. 0 means only those that are proven dead or past their deadline.
	Patience time.Duration

	// Wait is how long to wait for running backups to end; what is not decided then is
	// left to the next collection.
	Wait time.Duration

	grace time.Duration // another one, for tests

	// Progress is told what is being done. It is called from one goroutine at a time. May be
	// nil.
	Progress func(phase string, done, total int64)
}

// DefaultGarbage is the part of a pack that must be dead before it is compacted.
const DefaultGarbage = 0.25

// grace is how long a document of a collection stays after its end where collections
// cannot lock each other out, so that a slow one cannot act on it when it is gone.
const grace = 24 * time.Hour

// GCReport says what a garbage collection found and did.
type GCReport struct {
	DryRun  bool  `json:"dry_run"`
	Packs   int64 `json:"packs"`   // objects of packs when it began
	Bytes   int64 `json:"bytes"`   // their size
	Points  int64 `json:"points"`  // that were followed
	Nodes   int64 `json:"nodes"`   // of maps that were read
	Garbage int64 `json:"garbage"` // bytes of dead records in packs, whole or partly dead

	Deleted   int64    `json:"deleted"`            // objects that were all dead, or, in a dry run, would be
	Compacted int64    `json:"compacted"`          // packs
	Freed     int64    `json:"freed"`              // bytes
	Waiting   []string `json:"waiting,omitempty"`  // sessions of running backups that had to be waited for
	Left      int64    `json:"left"`               // packs whose turn comes in a later collection
	GivenUp   []string `json:"given_up,omitempty"` // sessions
	Damaged   []string `json:"damaged,omitempty"`  // packs that were left alone, and why
}

// GC deletes what no point needs, beside running writers, readers and other collections. See
// docs/gc.md for why that is safe. Killed at any moment, it leaves every point
// whole, and the next one goes on.
//
// Packs that become garbage are named in one step and deleted in a second, when all backups have ended
// that may not have seen the first. Both are done in one call, unless backups are running.
//
// The error wraps ErrLocked if another collection runs, and ErrCorrupt if a point
// cannot be followed to its end: then nothing is deleted. Memory: see marks; and two packs.
func (r *Repo) GC(ctx context.Context, o GCOptions) (_ GCReport, err error) {
	c, err := r.newCollection(o)
	if err != nil {
		return GCReport{}, err
	}
	if l, ok := r.blobs.(blob.Locker); ok && !o.DryRun {
		unlock, err := l.Lock(ctx, "gc")
		if err != nil {
			return c.report, fmt.Errorf("gc: %w", err)
		}
		c.locked = true
		defer func() { err = errors.Join(err, unlock()) }()
	}
	if err := c.run(ctx); err != nil {
		return c.report, fmt.Errorf("gc: %w", err)
	}
	return c.report, nil
}

// collection is one run of a garbage collection.
type collection struct {
	repo   *Repo
	o      GCOptions
	r      *reader // of its own: what is cached may be of before
	m      *marker
	locked bool
	now    func() time.Time
	report GCReport

	packs   []packObjectInfo // ascending by ID and generation
	newest  map[PackID]uint32
	checked time.Time // when a verdict was last seen to stand
}

func (r *Repo) newCollection(o GCOptions) (*collection, error) {
	if o.Garbage < 0 || o.Garbage > 1 || o.Patience < 0 || o.Wait < 0 {
		return nil, fmt.Errorf("%w: options of a garbage collection: %+v", ErrInvalid, o)
	}
	if o.Garbage == 0 {
		o.Garbage = DefaultGarbage
	}
	o.grace = cmp.Or(o.grace, grace)
	if o.Progress == nil {
		o.Progress = func(string, int64, int64) {}
	}
	rd, err := newReader(r.blobs, r.repo, r.codec, r.keys)
	if err != nil {
		return nil, err
	}
	c := &collection{repo: r, o: o, r: rd, m: newMarker(rd), now: time.Now, report: GCReport{DryRun: o.DryRun}}
	c.m.readOnly = o.DryRun
	c.m.nodes = func(n int64) {
		c.report.Nodes = n
		o.Progress("reading maps", n, 0)
	}
	return c, nil
}

func (c *collection) run(ctx context.Context) error {
	if c.o.DryRun {
		return c.look(ctx)
	}
	if err := c.dropSessions(ctx); err != nil {
		return err
	}
	// What earlier collections left comes first.
	pending, err := c.pending(ctx)
	if err != nil {
		return err
	}
	if len(pending) > 0 {
		if err := c.list(ctx); err != nil {
			return err
		}
		if err := c.settle(ctx, pending); err != nil {
			return err
		}
	}
	if err := c.list(ctx); err != nil {
		return err
	}
	v, err := c.condemn(ctx)
	if err != nil {
		return err
	}
	if v != nil {
		if err := c.settle(ctx, []*verdict{v}); err != nil {
			return err
		}
	}
	return cmp.Or(c.dropPartials(ctx), c.dropNotes(ctx), c.dropSessions(ctx))
}

// dropNotes deletes what is noted of the damage to points that are gone: whoever forgot them was interrupted.
func (c *collection) dropNotes(ctx context.Context) error {
	_, err := c.repo.dropStaleDamage(ctx, damagePrefix)
	return err
}

// dropPartials deletes checkpoints that no backup will go on from. A backup that is at one now does not need
// its object any more.
func (c *collection) dropPartials(ctx context.Context) error {
	_, err := c.repo.livePartials(ctx, c.now())
	return err
}

// look is a run that changes nothing.
func (c *collection) look(ctx context.Context) error {
	over, lost, err := c.overSessions(ctx)
	if err != nil {
		return err
	}
	for _, s := range append(over, lost...) { // a run would delete them first, or give them up
		c.m.pointless[s.name] = true
	}
	if err := c.list(ctx); err != nil {
		return err
	}
	dead, err := c.choose(ctx)
	if err != nil {
		return err
	}
	for _, p := range dead {
		if p.live == 0 {
			c.report.Deleted++
			c.report.Freed += p.size
		} else {
			c.report.Compacted++
			c.report.Freed += p.dead
		}
	}
	return nil
}

// pending returns the documents of earlier collections with something left to do, and drops those
// without.
func (c *collection) pending(ctx context.Context) ([]*verdict, error) {
	vs, err := c.repo.verdicts(ctx)
	if err != nil {
		return nil, err
	}
	var out []*verdict
	for _, v := range vs {
		if v.doc == nil {
			// Left over, or created while they were listed and what came after it was seen.
			there, err := c.repo.exists(ctx, v.name)
			if err != nil {
				return nil, err
			}
			if there {
				continue
			}
		}
		switch {
		case v.doc != nil && v.done == nil:
			out = append(out, v)
		case v.doc == nil, c.locked, c.now().Sub(v.done.Time) > c.o.grace:
			if err := c.repo.dropVerdict(ctx, v); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// list looks which packs there are. That comes before any marking.
func (c *collection) list(ctx context.Context) error {
	c.packs, c.newest = nil, map[PackID]uint32{}
	c.report.Packs, c.report.Bytes = 0, 0
	for p, err := range c.repo.packObjects(ctx, packPrefix) {
		if err != nil {
			return err
		}
		c.packs = append(c.packs, p)
		c.newest[p.Pack] = max(c.newest[p.Pack], p.Generation)
		c.report.Packs++
		c.report.Bytes += p.size
	}
	return nil
}

// candidate is a pack that is dead, or dead enough.
type candidate struct {
	packObjectInfo
	live, dead int64 // bytes
}

// choose marks, and picks what to condemn.
func (c *collection) choose(ctx context.Context) ([]candidate, error) {
	if _, err := c.mark(ctx); err != nil {
		return nil, err
	}
	looks := make([]look, len(c.packs))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxRequests)
	for i, p := range c.packs {
		if gctx.Err() != nil {
			break
		}
		c.o.Progress("looking at packs", int64(i), int64(len(c.packs)))
		g.Go(func() (err error) {
			looks[i], err = c.lookAt(gctx, p)
			return err
		})
	}
	if err := cmp.Or(g.Wait(), ctx.Err()); err != nil {
		return nil, err
	}
	var out []candidate
	c.report.Garbage, c.report.Damaged = 0, nil
	for _, l := range looks {
		c.report.Garbage += l.dead
		if l.damaged != "" {
			c.report.Damaged = append(c.report.Damaged, l.damaged)
		}
		if l.chosen {
			out = append(out, l.candidate)
		}
	}
	return out, nil
}

// look is what was found out about a pack.
type look struct {
	candidate
	chosen  bool
	damaged string // why it is left alone
}

func (c *collection) lookAt(ctx context.Context, p packObjectInfo) (look, error) {
	live := c.m.of(p.Pack)
	if p.Generation < c.newest[p.Pack] || live.count() == 0 {
		return look{candidate: candidate{p, 0, p.size}, chosen: true}, nil
	}
	x, err := c.r.loadGeneration(ctx, p.Pack, p.Generation)
	if errors.Is(err, ErrNotFound) {
		return look{}, nil // another collection is at it
	}
	var s division
	if err == nil {
		if s, err = divide(p.Pack, x, live); err != nil && !c.locked {
			return look{}, nil
		}
	}
	if errors.Is(err, ErrCorrupt) {
		return look{damaged: err.Error()}, nil
	}
	if err != nil {
		return look{}, err
	}
	return look{candidate: candidate{p, s.live, s.dead}, chosen: s.dead > 0 && s.garbage() >= c.o.Garbage}, nil
}

func (c *collection) mark(ctx context.Context) ([]*sessionState, error) {
	s, err := c.m.live(ctx, c.repo)
	c.report.Points = int64(len(c.m.seen))
	return s, err
}

// condemn is the first step: it makes known which packs will go. nil means none.
func (c *collection) condemn(ctx context.Context) (*verdict, error) {
	dead, err := c.choose(ctx)
	if err != nil {
		return nil, err
	}
	// Those that an earlier document names are waited for already.
	pending, err := c.repo.verdicts(ctx)
	if err != nil {
		return nil, err
	}
	named := map[packAt]bool{}
	for _, v := range pending {
		if v.doc != nil && v.done == nil {
			for _, p := range v.doc.Packs {
				named[p] = true
			}
		}
	}
	dead = slices.DeleteFunc(dead, func(d candidate) bool { return named[d.packAt] })
	if len(dead) > maxCondemned { // the most garbage first
		slices.SortStableFunc(dead, func(a, b candidate) int { return cmp.Compare(b.dead, a.dead) })
		c.report.Left += int64(len(dead) - maxCondemned)
		dead = dead[:maxCondemned]
	}
	if len(dead) == 0 {
		return nil, nil
	}
	doc := condemnedDoc{Time: c.now().UTC(), Process: thisProcess()}
	for _, d := range dead {
		doc.Packs = append(doc.Packs, d.packAt)
	}
	v := &verdict{name: newDocumentName(gcPrefix, c.now()), doc: &doc}
	if err := c.repo.putDocument(ctx, v.name, "gc", doc); err != nil {
		return nil, err
	}
	return v, nil
}

// settle is the second step, for those of vs whose sessions are over.
//
// The order is what safety rests on: the document is durable; then the
// sessions are listed that may not have seen it; then all these end; then points and after them
// sessions are listed and followed; then the document is seen to stand still. What no mark
// is on now will never be needed again while it stands.
func (c *collection) settle(ctx context.Context, vs []*verdict) error {
	var ready []*verdict
	for _, v := range vs {
		over, err := c.waited(ctx, v)
		if err != nil {
			return err
		}
		if over {
			ready = append(ready, v)
		} else {
			c.report.Left += int64(len(v.doc.Packs))
		}
	}
	if len(ready) == 0 {
		return nil
	}
	if _, err := c.mark(ctx); err != nil {
		return err
	}
	for _, v := range ready {
		c.checked = time.Time{}
		if err := c.sweep(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

// waited tells whether all sessions are over that may have begun without seeing v. It waits
// for them as long as the options say.
func (c *collection) waited(ctx context.Context, v *verdict) (bool, error) {
	for until := c.now().Add(c.o.Wait); ; {
		open, err := c.open(ctx, v)
		if err != nil || len(open) == 0 {
			return err == nil, err
		}
		if !c.now().Before(until) {
			c.report.Waiting = append(c.report.Waiting, open...)
			slices.Sort(c.report.Waiting)
			c.report.Waiting = slices.Compact(c.report.Waiting)
			return false, nil
		}
		c.o.Progress(fmt.Sprintf("waiting for %d running backups", len(open)), 0, 0)
		select {
		case <-time.After(min(time.Second, until.Sub(c.now()))):
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// open returns the sessions that v waits for and that have not ended. It ends
// those that are lost.
func (c *collection) open(ctx context.Context, v *verdict) ([]string, error) {
	sessions, err := c.repo.sessions(ctx)
	if err != nil {
		return nil, err
	}
	open := map[string]bool{}
	for _, s := range sessions {
		if !s.isOpen() {
			continue
		}
		if s.isLost(c.now(), c.o.Patience) {
			if err := c.giveUp(ctx, s); err != nil {
				return nil, err
			}
			continue
		}
		open[s.name] = true
	}
	if v.wait == nil { // these sessions were listed after v was durable
		v.wait = &waitDoc{Sessions: []string{}}
		for name := range open {
			v.wait.Sessions = append(v.wait.Sessions, name)
		}
		slices.Sort(v.wait.Sessions)
		err := c.repo.putDocument(ctx, v.name+waitSuffix, "gc-wait", v.wait)
		if errors.Is(err, ErrExists) { // another collection did so: as good
			err = c.repo.document(ctx, v.name+waitSuffix, "gc-wait", v.wait)
			if errors.Is(err, ErrNotFound) {
				return v.wait.Sessions, nil // and is done with it already
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(slices.Clone(v.wait.Sessions), func(name string) bool { return !open[name] }), nil
}

// stands tells whether v is still in force. It is asked after marking, and again
// when a minute has passed: another collection may have finished it.
func (c *collection) stands(ctx context.Context, v *verdict) (bool, error) {
	if c.locked && !c.checked.IsZero() || c.now().Sub(c.checked) < time.Minute {
		return true, nil
	}
	there, err := c.repo.exists(ctx, v.name)
	if err != nil || !there {
		return false, err
	}
	done, err := c.repo.exists(ctx, v.name+doneSuffix)
	if err != nil || done {
		return false, err
	}
	c.checked = c.now()
	return true, nil
}

// sweep deletes and compacts the packs of v by the marks that were made since its sessions were over.
func (c *collection) sweep(ctx context.Context, v *verdict) error {
	for i, p := range v.doc.Packs {
		c.o.Progress("deleting and compacting packs", int64(i), int64(len(v.doc.Packs)))
		if ok, err := c.stands(ctx, v); !ok {
			return err
		}
		if err := c.sweepPack(ctx, p); err != nil {
			return err
		}
	}
	if ok, err := c.stands(ctx, v); !ok {
		return err
	}
	if c.locked {
		return c.repo.dropVerdict(ctx, v)
	}
	err := c.repo.putDocument(ctx, v.name+doneSuffix, "gc-done", doneDoc{Time: c.now().UTC()})
	if errors.Is(err, ErrExists) {
		return nil
	}
	return err
}

func (c *collection) sweepPack(ctx context.Context, p packAt) error {
	size, err := c.sizeOf(ctx, p)
	if err != nil || size < 0 {
		return err // gone already
	}
	live := c.m.of(p.Pack)
	if newest := c.newest[p.Pack]; p.Generation < newest && live.count() > 0 {
		// A repair may have made it from what was left, before this one was put back.
		x, err := c.r.loadGeneration(ctx, p.Pack, newest)
		if err == nil {
			_, err = divide(p.Pack, x, live)
		}
		switch {
		case errors.Is(err, ErrCorrupt):
			c.report.Damaged = append(c.report.Damaged, err.Error())
			return nil
		case errors.Is(err, ErrNotFound):
			return nil
		case err != nil:
			return err
		}
	}
	if p.Generation < c.newest[p.Pack] || live.count() == 0 {
		if err := c.repo.removed(ctx, p.object()); err != nil {
			return err
		}
		c.report.Deleted++
		c.report.Freed += size
		return nil
	}
	x, err := c.r.loadGeneration(ctx, p.Pack, p.Generation)
	var s division
	if err == nil {
		if s, err = divide(p.Pack, x, live); err != nil && !c.locked {
			return nil
		}
	}
	if err == nil && (s.dead == 0 || s.garbage() < c.o.Garbage) {
		return nil // alive: written by a backup that has ended meanwhile
	}
	var left int64
	if err == nil {
		left, err = c.r.compact(ctx, p, x, live)
	}
	switch {
	case errors.Is(err, ErrCorrupt):
		c.report.Damaged = append(c.report.Damaged, err.Error())
		return nil
	case errors.Is(err, ErrNotFound):
		return nil // another collection was faster
	case err != nil:
		return err
	}
	if err := c.repo.removed(ctx, p.object()); err != nil {
		return err
	}
	c.newest[p.Pack] = p.Generation + 1
	c.report.Compacted++
	c.report.Freed += size - left
	return nil
}

// sizeOf returns the size of an object, or -1 if it is gone.
func (c *collection) sizeOf(ctx context.Context, p packAt) (int64, error) {
	info, err := c.repo.blobs.Stat(ctx, p.object())
	if errors.Is(err, ErrNotFound) {
		return -1, nil
	}
	return info.Size, err
}

// dropSessions gives up the sessions that are surely lost, and deletes what is over of sessions. That not while a document of a collection is in force: one that
// marks now may have missed the point of such a session, and must see the session.
// What is deleted here had its point published before a document was looked for, so before one
// that is made later.
func (c *collection) dropSessions(ctx context.Context) error {
	over, lost, err := c.overSessions(ctx)
	if err != nil {
		return err
	}
	for _, s := range lost {
		if err := c.giveUp(ctx, s); err != nil {
			return err
		}
	}
	vs, err := c.repo.verdicts(ctx)
	if err != nil {
		return err
	}
	for _, v := range vs {
		if v.doc != nil && v.done == nil {
			return nil
		}
	}
	for _, s := range over {
		if err := c.repo.dropSession(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// overSessions lists the sessions that protect nothing any more, and those that are open and need no patience
// to be given up: what their parents' maps hold would stay for as long as nothing else is garbage.
func (c *collection) overSessions(ctx context.Context) (over, lost []*sessionState, err error) {
	sessions, err := c.repo.sessions(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, s := range sessions {
		ok, err := s.isOver(ctx, c.now(), c.repo.exists)
		if err != nil {
			return nil, nil, err
		}
		switch {
		case ok:
			over = append(over, s)
		case s.isOpen() && s.isLost(c.now(), 0):
			lost = append(lost, s)
		}
	}
	return over, lost, nil
}

// giveUp ends an open session, and reports it unless its writer was first.
func (c *collection) giveUp(ctx context.Context, s *sessionState) error {
	if err := c.repo.giveUp(ctx, s); err != nil {
		return err
	}
	if s.end.How == endGivenUp {
		c.report.GivenUp = append(c.report.GivenUp, s.name)
	}
	return nil
}
