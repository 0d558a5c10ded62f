package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"
)

// encryptedEnv makes all tests of the package run on encrypted repositories.
const encryptedEnv = "TIDEMARK_TEST_ENCRYPTED"

var testEncrypted = os.Getenv(encryptedEnv) != ""

// testPassphrase opens the repositories of tests; its cost is the least that there is.
var testPassphrase = Passphrase("correct horse")

func testInit(ctx context.Context, location string) (*Repo, error) {
	return Init(ctx, location, testNew()...)
}

// testNew makes a new repository one that testKey opens.
func testNew() []Option {
	if testEncrypted {
		return []Option{Encrypt(NewKey{Role: FullKey, Passphrase: testPassphrase})}
	}
	return nil
}

func testOpen(ctx context.Context, location string) (*Repo, error) {
	return Open(ctx, location, testKey()...)
}

// testKey opens what testInit made.
func testKey() []Option {
	if testEncrypted {
		return []Option{WithKey(testPassphrase)}
	}
	return nil
}

// builder begins a pack of r.
func builder(t testing.TB, r *Repo, kind packKind, id PackID) *packBuilder {
	t.Helper()
	b, err := newPackBuilder(nil, kind, id, r.repo, r.keys)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testRepo makes a repository in a folder of its own, with small packs so that
// a test fills several.
func testRepo(t testing.TB) *Repo {
	t.Helper()
	r, err := testInit(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r.dataPackLen, r.nodePackLen = 64<<10, 8<<10
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// reopen opens r's folder again, with empty caches.
func reopen(t testing.TB, r *Repo) *Repo {
	t.Helper()
	n, err := testOpen(t.Context(), r.Location())
	if err != nil {
		t.Fatal(err)
	}
	n.dataPackLen, n.nodePackLen = r.dataPackLen, r.nodePackLen
	t.Cleanup(func() { _ = n.Close() })
	return n
}

type write struct {
	off int64
	p   []byte
}

// backup publishes a point of vm "a" whose disk "disk0" took the writes.
func backup(t testing.TB, r *Repo, o DiskOptions, writes ...write) *Point {
	t.Helper()
	return backupVM(t, r, "a", o, writes...)
}

// backupVM is backup for any VM.
func backupVM(t testing.TB, r *Repo, vm string, o DiskOptions, writes ...write) *Point {
	t.Helper()
	if o.Name == "" {
		o.Name = "disk0"
	}
	w, err := r.Begin(t.Context(), vm)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.Abort(); err != nil {
			t.Error(err)
		}
	}()
	d, err := w.Disk(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range writes {
		if err := d.Write(t.Context(), x.off, x.p); err != nil {
			t.Fatal(err)
		}
	}
	p, err := w.Commit(t.Context(), testPoint(o.Name))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func testPoint(disks ...string) Point {
	p := Point{Consistency: Crash, Quiesce: Quiesce{Method: "none"}, Tool: "test"}
	for _, d := range disks {
		p.Disks = append(p.Disks, Disk{Name: d, ChangeID: "c", Tracking: Tracking{Mode: "full"}})
	}
	return p
}

// readDisk reads a whole disk through its map.
func readDisk(ctx context.Context, r *Repo, root Root) ([]byte, error) {
	m, err := r.Map(root)
	if err != nil {
		return nil, err
	}
	out := make([]byte, m.Grains()*int64(root.Grain))
	for g := range m.Grains() {
		ref, err := m.Lookup(ctx, g)
		if err != nil {
			return nil, err
		}
		if err := r.ReadGrain(ctx, ref, out[g*int64(root.Grain):][:root.Grain]); err != nil {
			return nil, err
		}
	}
	return out[:root.Size], nil
}

func wantDisk(t testing.TB, r *Repo, p *Point, want []byte) {
	t.Helper()
	got, err := readDisk(t.Context(), r, p.Disks[0].Root)
	if err != nil {
		t.Fatalf("%s: %v", p.Name(), err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: the disk differs from what was written, first at byte %d", p.Name(), firstDiff(got, want))
	}
}

func firstDiff(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func wantClean(t testing.TB, r *Repo, p *Point) {
	t.Helper()
	rep, err := r.Verify(t.Context(), p, true, nil)
	if err != nil || !rep.OK() {
		t.Fatalf("verify %s: %v, problems %+v", p.Name(), err, rep.Problems)
	}
}

// noise is incompressible content.
func noise(seed uint64, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), seed))).Read(p)
	return p
}

// text is compressible content.
func text(seed uint64, n int) []byte {
	p := bytes.Repeat(noise(seed, 64), n/64+1)
	return p[:n]
}
