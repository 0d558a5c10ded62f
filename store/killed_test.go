package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/faultblob"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

// operation is one that changes a repository. Whatever ends it, what was acknowledged before or by it holds, and
// once more it comes to its end.
type operation struct {
	name    string
	prepare func(s *stage)
	do      func(ctx context.Context, a *actor) error
	// forgets are points that it may delete.
	forgets func(p *Point) bool
	// damaged: points have damage, before and after.
	damaged bool
	// changes is the least number of changes that the operation makes to the storage, else it shows nothing.
	changes int64
	// wants looks at what is the operation's own, when it was ended somewhere and when it is done.
	wants func(s *stage, t *testing.T, location string, done bool)
}

// actor is who does an operation: in a child, or over storage that fails.
type actor struct {
	repo *Repo
	open func(location string) (*Repo, error) // of another repository
	args []string
	say  func(string) // "point ID", "forgot ID": acknowledged
}

// stage is a repository in a folder on which an operation is tried: always on copies of it.
type stage struct {
	t      *testing.T
	op     *operation
	repo   *Repo
	from   *Repo // another one; may be nil
	args   []string
	points map[string]PointName // acknowledged, by ID
	// What can't be read, by point and grain; after the operation, once it has been done.
	bad, badAfter map[string]int
	keys          []credential
	fixed         []string // names of objects that are the same at the end, wherever it was ended
}

// credential opens the repository before the operation, after it, or both.
type credential struct {
	key           Key
	before, after bool
}

func operations() []*operation {
	ops := []*operation{
		{name: "backup", prepare: func(*stage) {}, do: doBackup, changes: 30},
		{name: "backup with checkpoints", prepare: func(*stage) {}, do: doCheckpoints, changes: 40},
		{name: "forget", prepare: prepareForget, do: doForget, forgets: forgetful, changes: 12},
		{name: "gc", prepare: prepareGarbage, do: doGC(1), changes: 30},
		{name: "compaction", prepare: prepareGarbage, do: doGC(1e-9), changes: 30},
		{name: "copy", prepare: prepareCopy, do: doCopy, changes: 50, wants: wantsCopies},
		{name: "repair", prepare: prepareRepair, do: doRepair, damaged: true, changes: 30},
	}
	if testEncrypted {
		ops = append(ops,
			&operation{name: "key add", prepare: prepareKeys, do: doAddKey, changes: 8, wants: wantsKeys},
			&operation{name: "key remove", prepare: prepareKeys, do: doRemoveKey, changes: 8, wants: wantsKeys},
			&operation{name: "key rotate", prepare: prepareKeys, do: doRotateKeys, changes: 8, wants: wantsKeys},
		)
	}
	return ops
}

func operationOf(name string) *operation {
	all := operations()
	return all[slices.IndexFunc(all, func(o *operation) bool { return o.name == name })]
}

// operationJob does an operation: its name, what a power failure takes, the repository, the operation's own.
func operationJob(ctx context.Context, l *faultblob.Layer, say func(string), args []string) error {
	l.Lose(faultblob.Loss(args[1]))
	open := func(location string) (*Repo, error) { return crashRepo(ctx, l, location) }
	r, err := open(args[2])
	if err != nil {
		return err
	}
	if err := operationOf(args[0]).do(ctx, &actor{r, open, args[3:], say}); err != nil {
		return err
	}
	say("done")
	return nil
}

// crashPoint makes a point of what the disk is after n changes; of other VMs than "a" only the first 3 MiB,
// shared with whoever has them.
func crashPoint(t testing.TB, r *Repo, vm string, n int, dedup bool) *Point {
	t.Helper()
	image := crashImage(n)
	if vm != "a" {
		image = image[:otherSize]
	}
	w, err := r.Begin(t.Context(), vm)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: crashSize, Grain: crashGrain, Dedup: dedup})
	if err == nil {
		err = d.Write(t.Context(), 0, image)
	}
	if err != nil {
		t.Fatal(err)
	}
	p := testPoint("disk0")
	p.Disks[0].ChangeID = fmt.Sprint(n)
	made, err := w.Commit(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

const otherSize = 3 << 20

var crashImages sync.Map // of the number of changes

// imageOf is what the disk of a point must be.
func imageOf(p *Point) []byte {
	v, ok := crashImages.Load(p.Disks[0].ChangeID)
	if !ok {
		var n int
		_, _ = fmt.Sscan(p.Disks[0].ChangeID, &n)
		v, _ = crashImages.LoadOrStore(p.Disks[0].ChangeID, crashImage(n))
	}
	image := v.([]byte)
	if p.VM != "a" {
		return append(slices.Clone(image[:otherSize]), make([]byte, crashSize-otherSize)...)
	}
	return image
}

func doBackup(ctx context.Context, a *actor) error {
	for range 2 {
		p, err := crashBackup(ctx, a.repo)
		if err != nil {
			return err
		}
		a.say("point " + p.ID)
	}
	return nil
}

// fourPoints are of "a", and one of "b" that shares some of the last one's.
func fourPoints(s *stage, r *Repo) (points []*Point) {
	for n := range 4 {
		points = append(points, crashPoint(s.t, r, "a", n+1, false))
	}
	return append(points, crashPoint(s.t, r, "b", 4, true))
}

func prepareForget(s *stage) {
	points := fourPoints(s, s.repo)
	// A note, and an older one that was not deleted.
	for n := range uint32(2) {
		d := Damage{Found: time.Now(), Lost: []Lost{{Object: "packs/x", Disk: "disk0", Len: 1}}}
		if err := s.repo.putDocument(s.t.Context(), s.repo.damageObject(points[2].Name(), n+1), "damage", d); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := s.repo.Pin(s.t.Context(), points[0].Name(), "kept"); err != nil {
		s.t.Fatal(err)
	}
}

func forgetful(p *Point) bool {
	return p.VM == "a" && (p.Disks[0].ChangeID == "2" || p.Disks[0].ChangeID == "3")
}

func doForget(ctx context.Context, a *actor) error {
	names, err := a.repo.Points(ctx, "a")
	if err != nil {
		return err
	}
	for _, n := range names {
		p, err := a.repo.Point(ctx, n)
		if err != nil {
			return err
		}
		if pinned := p.Disks[0].ChangeID == "1"; !forgetful(p) && !pinned {
			continue
		}
		forgot, err := a.repo.Forget(ctx, []PointName{n}, nil)
		if err != nil && !errors.Is(err, ErrPinned) {
			return err
		}
		for _, n := range forgot {
			a.say("forgot " + n.ID)
		}
	}
	return nil
}

// prepareGarbage leaves packs that are dead, such that are partly so, what a backup left that has not
// ended, and of a collection what one leaves that is killed at its end.
func prepareGarbage(s *stage) {
	t := s.t
	points := fourPoints(s, s.repo)
	if _, err := s.repo.Forget(t.Context(), names([]*Point{points[0], points[3]}), nil); err != nil {
		t.Fatal(err)
	}
	w, err := s.repo.Begin(t.Context(), "z")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Abort() })
	d, err := w.Disk(t.Context(), DiskOptions{Name: "disk0", Size: crashSize, Grain: crashGrain})
	if err != nil {
		t.Fatal(err)
	}
	put(t, d, crashImage(9), 0, 1<<20)
	checkpoint(t, w, Covered{0, 1 << 20})
	put(t, d, crashImage(9), 1<<20, 1<<20)
	if err := w.data.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	left := newDocumentName(gcPrefix, time.Now())
	if err := s.repo.putDocument(t.Context(), left+waitSuffix, "gc-wait", waitDoc{Sessions: []string{}}); err != nil {
		t.Fatal(err)
	}
}

func doGC(garbage float64) func(context.Context, *actor) error {
	return func(ctx context.Context, a *actor) error {
		_, err := a.repo.GC(ctx, GCOptions{Garbage: garbage, Patience: 1})
		return err
	}
}

func prepareCopy(s *stage) {
	t := s.t
	from, err := testInit(t.Context(), filepath.Join(t.TempDir(), "from"))
	if err != nil {
		t.Fatal(err)
	}
	from.dataPackLen, from.nodePackLen = crashDataPack, crashNodePack
	t.Cleanup(func() { _ = from.Close() })
	s.from = from
	points := fourPoints(s, from)
	copied(t, from, s.repo, points[0].Name())
	crashPoint(t, s.repo, "c", 2, false) // some of what is to be copied
	s.args = []string{from.Location()}
}

func doCopy(ctx context.Context, a *actor) error {
	from, err := a.open(a.args[0])
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	names, err := from.allPoints(ctx)
	if err != nil {
		return err
	}
	for _, some := range [][]PointName{names[:2], names} {
		rep, err := from.Copy(ctx, a.repo, some, nil)
		for _, n := range rep.Points {
			a.say("point " + n.ID)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func wantsCopies(s *stage, t *testing.T, location string, done bool) {
	r := s.open(t, location)
	var last *Point
	n := 0
	for _, name := range allNames(t, r) {
		p, err := r.Point(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if p.VM == "c" {
			continue
		}
		n++
		if p.Origin == nil || p.Origin.Repository != s.from.ID() {
			t.Errorf("%s is no copy", name)
		}
		if last != nil && last.VM == p.VM && p.Parent != last.ID {
			t.Errorf("the parent of %s is %q, want %q", name, p.Parent, last.ID)
		}
		last = p
	}
	if done && n != 5 {
		t.Errorf("%d points were copied", n)
	}
}

// prepareRepair damages packs so that a repair has to replace, to rebuild, to keep, and to note.
func prepareRepair(s *stage) {
	t, r := s.t, s.repo
	first := crashPoint(t, r, "a", 1, false)
	second := crashPoint(t, r, "a", 2, false)
	crashPoint(t, r, "b", 1, false) // good copies of some
	twinNodes(t, r)
	refs := make([]Ref, crashSize/crashGrain)
	m, err := r.Map(first.Disks[0].Root)
	if err == nil {
		err = m.Refs(t.Context(), 0, refs)
	}
	if err != nil {
		t.Fatal(err)
	}
	// By the order of the disk: of the first ones there are copies.
	seen := map[PackID]bool{}
	for _, ref := range refs {
		if ref.IsZero() || seen[ref.Pack] {
			continue
		}
		switch len(seen) {
		case 0, 4:
			harm(t, r, ref.Pack, "record")
		case 1, 3:
			harm(t, r, ref.Pack, "footer")
		case 2:
			harm(t, r, ref.Pack, "removed")
		}
		seen[ref.Pack] = true
	}
	if len(seen) < 5 {
		t.Fatalf("only %d packs", len(seen))
	}
	harm(t, r, second.Disks[0].Root.Ref.Pack, "record") // a node
}

func doRepair(ctx context.Context, a *actor) error {
	names, err := a.repo.allPoints(ctx)
	if err != nil {
		return err
	}
	_, err = a.repo.Repair(ctx, names, RepairOptions{})
	return err
}

// prepareKeys makes a repository with a full key and a writer's besides the passphrase, and a key that is to be added.
func prepareKeys(s *stage) {
	t := s.t
	crashPoint(t, s.repo, "a", 1, false)
	full, _ := addFile(t, s.repo, FullKey)
	writer, id := addFile(t, s.repo, WriterKey)
	fresh, err := NewKeyFile()
	if err == nil {
		err = s.repo.Trust(fresh)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.keys = []credential{
		{testPassphrase, true, true}, {full, true, true},
		{writer, true, s.op.name != "key remove"}, {fresh, false, s.op.name == "key add"},
	}
	s.args = []string{string(fresh.Public()), id}
}

func doAddKey(ctx context.Context, a *actor) error {
	public, err := ParsePublicKey([]byte(a.args[0]))
	if err != nil {
		return err
	}
	_, _, err = a.repo.AddKey(ctx, NewKey{Role: FullKey, Name: "new", Public: public})
	if errors.Is(err, ErrExists) {
		return nil // it had come so far
	}
	return err
}

func doRemoveKey(ctx context.Context, a *actor) error {
	err := a.repo.RemoveKey(ctx, a.args[1])
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

func doRotateKeys(ctx context.Context, a *actor) error {
	_, err := a.repo.RotateKeys(ctx)
	return err
}

func wantsKeys(s *stage, t *testing.T, location string, done bool) {
	for i, c := range s.keys {
		r, err := Open(t.Context(), location, WithKey(c.key))
		if must := c.before && c.after || done && c.after; must && err != nil {
			t.Errorf("key %d opens it no more: %v", i, err)
		}
		if never := !c.before && !c.after || done && !c.after; never && err == nil {
			t.Errorf("key %d opens it", i)
		}
		if err != nil {
			if !errors.Is(err, ErrKey) {
				t.Errorf("key %d: %v", i, err)
			}
			continue
		}
		l, err := r.Keys(t.Context())
		if err != nil || len(l.Unsigned) > 0 || done && len(l.Old) > 0 {
			t.Errorf("keys: %+v, %v", l, err)
		}
		if done && s.op.name == "key rotate" && l.Generation < 2 {
			t.Errorf("generation %d", l.Generation)
		}
		_ = r.Close()
	}
}

func (s *stage) open(t *testing.T, location string) *Repo {
	t.Helper()
	r, err := testOpen(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	r.dataPackLen, r.nodePackLen = crashDataPack, crashNodePack
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func newStage(t *testing.T, op *operation) *stage {
	t.Helper()
	r, err := testInit(t.Context(), filepath.Join(t.TempDir(), "r"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	r.dataPackLen, r.nodePackLen = crashDataPack, crashNodePack
	s := &stage{t: t, op: op, repo: r, points: map[string]PointName{}}
	op.prepare(s)
	for _, n := range allNames(t, r) {
		s.points[n.ID] = n
	}
	s.bad = s.unreadable(t, s.open(t, r.Location()))
	if (len(s.bad) > 0) != op.damaged {
		t.Fatalf("unreadable from the beginning: %v", s.bad)
	}
	return s
}

// unreadable reads all points that are listed, as anybody would, what they share once. What is read must be right;
// points that can be read must be found good.
func (s *stage) unreadable(t *testing.T, r *Repo) map[string]int {
	t.Helper()
	bad := map[string]int{}
	seen := map[Ref][]byte{}
	v, err := r.NewVerification()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range allNames(t, r) {
		p, err := r.Point(t.Context(), n)
		if err != nil {
			t.Fatalf("a point by halves: %v", err)
		}
		image := imageOf(p)
		m, err := r.Map(p.Disks[0].Root)
		if err != nil {
			t.Fatal(err)
		}
		for g := range m.Grains() {
			ref, err := m.Lookup(t.Context(), g)
			got := seen[ref]
			if err == nil && got == nil {
				got = make([]byte, crashGrain)
				if err = r.ReadGrain(t.Context(), ref, got); err == nil {
					seen[ref] = got
				}
			}
			switch {
			case err == nil && !bytes.Equal(got, image[g*crashGrain:][:crashGrain]):
				t.Fatalf("%s: grain %d is wrong", n, g)
			case err != nil && !errors.Is(err, ErrCorrupt):
				t.Fatal(err)
			case err != nil:
				bad[fmt.Sprintf("%s grain %d", n.ID, g)]++
				bad[n.ID]++
			}
		}
		rep, err := v.Point(t.Context(), n, nil)
		if err != nil || rep.OK() != (bad[n.ID] == 0) {
			t.Fatalf("verify %s: %v, %+v; %d grains can't be read", n, err, rep, bad[n.ID])
		}
	}
	return bad
}

// check looks at the repository after the operation was ended or done.
func (s *stage) check(t *testing.T, location string, said []string, done bool) {
	t.Helper()
	r := s.open(t, location)
	bad := s.unreadable(t, r)
	for g := range bad {
		before := s.bad
		if done && s.badAfter != nil {
			before = s.badAfter
		}
		if before[g] == 0 {
			t.Errorf("%s can't be read", g)
		}
	}
	must, gone := map[string]PointName{}, map[string]bool{}
	for id, n := range s.points {
		must[id] = n
	}
	for _, line := range said {
		what, id, _ := strings.Cut(line, " ")
		switch what {
		case "point":
			must[id] = PointName{ID: id}
		case "forgot":
			gone[id] = true
		}
	}
	for _, n := range allNames(t, r) {
		p, err := r.Point(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		delete(must, n.ID)
		forgotten := s.op.forgets != nil && s.op.forgets(p)
		if gone[n.ID] || done && forgotten {
			t.Errorf("%s is there again", n)
		}
	}
	for id, n := range must {
		if gone[id] {
			continue
		}
		p, err := s.repo.Point(t.Context(), n)
		if err != nil || s.op.forgets == nil || !s.op.forgets(p) {
			t.Errorf("point %s was acknowledged and is lost", id)
		}
	}
	if s.op.wants != nil {
		s.op.wants(s, t, location, done)
	}
}

// after is how much later it is for the last collection: what stays for safety's sake has gone by then.
const after = 100 * 24 * time.Hour

// collectLater collects as if all that waits for time had waited.
func collectLater(t *testing.T, r *Repo) {
	t.Helper()
	for n := range 4 { // documents, sessions and checkpoints; then what they kept
		c, err := r.newCollection(GCOptions{Garbage: 1e-9, Patience: 1})
		if err != nil {
			t.Fatal(err)
		}
		_, c.locked = r.blobs.(blob.Locker)
		c.now = func() time.Time { return time.Now().Add(after + time.Duration(n)*2*grace) }
		if err := c.run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// wantJustWhatIsNeeded looks that no object and no record is left that no point needs.
func (s *stage) wantJustWhatIsNeeded(t *testing.T, r *Repo) {
	t.Helper()
	m := newMarker(r.reader)
	for _, n := range allNames(t, r) {
		p, err := r.Point(t.Context(), n)
		if err == nil {
			err = m.roots(t.Context(), rootRefs(p))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	keys, packs := 0, map[PackID]bool{}
	all, err := r.names(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		folder, _, _ := strings.Cut(name, "/")
		switch folder {
		case "config", "points", "pins", "damaged", "salvage":
		case "keys":
			keys++
		case "packs":
			id, generation, ok := parsePackObject(name)
			if !ok || packs[id] {
				t.Errorf("left: %s", name)
				continue
			}
			packs[id] = true
			x, err := r.loadGeneration(t.Context(), id, generation)
			if errors.Is(err, ErrCorrupt) && s.op.damaged {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			live := m.of(id)
			if len(live) == 0 {
				t.Errorf("left: %s", name)
			}
			for ord := range uint32(x.count()) {
				e, _ := x.entry(ord)
				if !live.has(ord) && !e.absent() || live.has(ord) && e.absent() && !s.op.damaged {
					t.Errorf("%s, record %d: needed: %v, absent: %v", name, ord, live.has(ord), e.absent())
				}
			}
		default:
			t.Errorf("left: %s", name)
		}
	}
	if want := len(testNew()); keys != want {
		t.Errorf("%d documents of keys", keys)
	}
}

// fixedNames lists what is the same at every end.
func fixedNames(t *testing.T, r *Repo) []string {
	t.Helper()
	fixed := []string{}
	for _, prefix := range []string{damagePrefix, pinPrefix, salvagePrefix} {
		some, err := r.names(t.Context(), prefix)
		if err != nil {
			t.Fatal(err)
		}
		fixed = append(fixed, some...)
	}
	return fixed
}

// ended is called when the operation was ended somewhere: what was acknowledged holds, the operation comes to its end,
// a collection finds what is left, and the next backup goes on; the last two in the folder, where they are quick.
func (s *stage) ended(t *testing.T, location, folder string, said []string, again func() []string) {
	t.Helper()
	s.check(t, location, said, false)
	said = append(said, again()...)
	if !slices.Contains(said, "done") {
		t.Fatalf("once more: %v", said)
	}
	r := s.open(t, folder)
	collectLater(t, r)
	s.wantJustWhatIsNeeded(t, r)
	if fixed := fixedNames(t, r); s.fixed == nil {
		s.fixed = fixed
	} else if !slices.Equal(fixed, s.fixed) {
		t.Errorf("at the end there are %v, not %v", fixed, s.fixed)
	}
	s.check(t, folder, said, true)
	p, err := crashBackup(t.Context(), r)
	if err != nil {
		t.Fatalf("the next backup: %v", err)
	}
	if !s.op.damaged {
		wantDisk(t, s.open(t, folder), p, imageOf(p))
	}
}

// backend is where a copy of a repository is put.
type backend struct {
	name   string
	losses []faultblob.Loss
	// fork also tells the folder of the copy's files, whatever serves them.
	fork func(t *testing.T, from string) (location, folder string, drop func())
}

// forkFiles makes a repository's objects those of another folder as well.
func forkFiles(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, from)
		if strings.HasPrefix(e.Name(), ".") {
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if e.IsDir() {
			return os.MkdirAll(to+name, 0o700)
		}
		return os.Link(path, to+name) // objects are never changed
	})
	if err != nil {
		t.Fatal(err)
	}
}

func inFolder(name string, losses ...faultblob.Loss) backend {
	return backend{name, losses, func(t *testing.T, from string) (string, string, func()) {
		to, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		forkFiles(t, from, to)
		return to, to, func() { _ = os.RemoveAll(to) }
	}}
}

var onServerNumber atomic.Int64

func onServer(srv *s3test.Server) backend {
	return backend{"s3", faultblob.Losses()[:1], func(t *testing.T, from string) (string, string, func()) {
		name := fmt.Sprintf("fork%d", onServerNumber.Add(1))
		to := filepath.Join(srv.Dir, s3test.Bucket, name)
		forkFiles(t, from, to)
		return "s3:" + srv.Endpoint + "/" + s3test.Bucket + "/" + name, to, func() { _ = os.RemoveAll(to) }
	}}
}

// someMoments returns up to few of 1 to n, or all of them.
func someMoments(n int64, few int) (out []int64) {
	for _, i := range rand.Perm(int(n)) {
		out = append(out, int64(i)+1)
	}
	if os.Getenv(everyMomentEnv) == "" {
		out = out[:min(few, len(out))]
	}
	slices.Sort(out)
	return out
}

// TestOperationsKilled kills each operation at every moment at which it changes what is stored, by kill -9 and by power
// failures, in a folder and on a server.
func TestOperationsKilled(t *testing.T) {
	places := []backend{inFolder("folder", faultblob.LoseNothing), inFolder("folder, power failure", faultblob.Losses()[1:]...)}
	if _, err := s3test.Find(); err == nil {
		places = append(places, onServer(s3test.Start(t)))
	}
	for _, op := range operations() {
		for _, where := range places {
			t.Run(op.name+", "+where.name, func(t *testing.T) {
				t.Parallel()
				killOperation(t, newStage(t, op), where)
			})
		}
	}
	if len(places) < 3 {
		t.Log(`SKIP: no S3 server: build it with "make bin/versitygw"`)
	}
}

func killOperation(t *testing.T, s *stage, where backend) {
	args := slices.Clone(s.args)
	if s.from != nil {
		from, _, _ := where.fork(t, s.from.Location())
		args[0] = from
	}
	run := func(t *testing.T, at int64, location string) faultblob.Outcome {
		t.Helper()
		loss := where.losses[at%int64(len(where.losses))]
		return faultblob.Run(t, at, "operation", append([]string{s.op.name, string(loss), location}, args...)...)
	}
	location, folder, drop := where.fork(t, s.repo.Location())
	dry := run(t, 0, location)
	if dry.Moments < s.op.changes {
		t.Fatalf("%d moments: the operation does too little", dry.Moments)
	}
	s.badAfter = s.unreadable(t, s.open(t, location))
	if s.op.damaged && (len(s.badAfter) == 0 || len(s.badAfter) > len(s.bad)-10) {
		t.Fatalf("%d grains are unreadable, %d were", len(s.badAfter), len(s.bad))
	}
	s.ended(t, location, folder, dry.Said, func() []string { return run(t, 0, location).Said })
	drop()
	killed, began := 0, time.Now()
	moments := someMoments(dry.Moments, 1)
	for _, at := range moments {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			location, folder, drop := where.fork(t, s.repo.Location())
			defer drop()
			o := run(t, at, location)
			if o.Killed != "" {
				killed++
			}
			s.ended(t, location, folder, o.Said, func() []string { return run(t, 0, location).Said })
			if t.Failed() {
				t.Logf("killed at %s; said: %v", cmp.Or(o.Killed, "its end"), o.Said)
			}
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("killed at %d of %d moments, %d grains unreadable, %d at the end: %v", killed, dry.Moments, len(s.bad), len(s.badAfter), time.Since(began).Round(time.Second))
	if killed < len(moments)-1-len(moments)/20 {
		t.Errorf("only %d of %d children were killed", killed, len(moments))
	}
}

// TestOperationsOverFaultyStorage does each operation, but backups, over storage that fails: what fails says so and is no damage. What it
// leaves is as good as what a killed one does.
func TestOperationsOverFaultyStorage(t *testing.T) {
	random := below(func(seed uint64) faultblob.Handler {
		return faultblob.All(faultblob.Delays(seed, time.Millisecond), faultblob.Random(seed, 150))
	})
	type storage struct {
		backend
		open faultyOpen
		must bool // fail, now and then
	}
	all := []storage{{inFolder("folder, random in disorder"), random, true}, {inFolder("folder, failing disk"), openFailingDisk, true}}
	if _, err := s3test.Find(); err == nil {
		srv := onServer(s3test.Start(t))
		for _, over := range []storage{{srv, random, true}, {srv, overBadNetwork(20, time.Minute), false}, {srv, overBadNetwork(60, time.Nanosecond), true}} {
			over.name += ", " + []string{"random in disorder", "bad network", "bad network, no patience"}[len(all)-2]
			all = append(all, over)
		}
	} else {
		t.Log(`SKIP: no S3 server: build it with "make bin/versitygw"`)
	}
	for _, over := range all {
		t.Run(over.name, func(t *testing.T) {
			t.Parallel()
			failed, runs := 0, 0
			for _, op := range operations()[2:] {
				s := newStage(t, op)
				for seed := range uint64(2) {
					location, folder, drop := over.fork(t, s.repo.Location())
					var said []string
					do := func(open faultyOpen) error {
						opened := func(location string) (*Repo, error) {
							return openSmall(t.Context(), open(t, location, seed+1), location)
						}
						r, err := opened(location)
						if err != nil {
							return err
						}
						defer func() { _ = r.Close() }()
						err = op.do(t.Context(), &actor{r, opened, s.args, func(what string) { said = append(said, what) }})
						if err == nil {
							said = append(said, "done")
						}
						return err
					}
					runs++
					if err := do(over.open); err != nil {
						failed++
						wantNoDamage(t, err)
						if !over.must {
							t.Errorf("%s, seed %d: %v", op.name, seed, err)
						}
					}
					s.ended(t, location, folder, said, func() []string {
						if err := do(func(t *testing.T, location string, _ uint64) blob.Store { return openPlain(t, location) }); err != nil {
							t.Fatalf("%s, once more: %v", op.name, err)
						}
						return said
					})
					drop()
					if t.Failed() {
						t.Fatalf("%s, seed %d", op.name, seed)
					}
				}
			}
			t.Logf("%d of %d operations failed", failed, runs)
			if over.must && failed == 0 {
				t.Error("nothing failed")
			}
		})
	}
}
