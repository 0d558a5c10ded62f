package store

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

// encryptedRepo is as testRepo, encrypted whatever the mode of the run.
func encryptedRepo(t testing.TB) *Repo {
	t.Helper()
	r, err := Init(t.Context(), t.TempDir(), Encrypt(NewKey{Role: FullKey, Passphrase: testPassphrase, Name: "first"}))
	if err != nil {
		t.Fatal(err)
	}
	r.dataPackLen, r.nodePackLen = 64<<10, 8<<10
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// openWith opens r's folder again, with another key.
func openWith(t testing.TB, r *Repo, k Key) *Repo {
	t.Helper()
	o, err := Open(t.Context(), r.Location(), WithKey(k))
	if err != nil {
		t.Fatal(err)
	}
	o.dataPackLen, o.nodePackLen = r.dataPackLen, r.nodePackLen
	t.Cleanup(func() { _ = o.Close() })
	return o
}

// addFile adds a key file to r and returns it, and its ID.
func addFile(t testing.TB, r *Repo, role Role) (*KeyFile, string) {
	t.Helper()
	k, err := NewKeyFile()
	if err != nil {
		t.Fatal(err)
	}
	public, err := ParsePublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	info, _, err := r.AddKey(t.Context(), NewKey{Role: role, Name: "host", Public: public})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Trust(k); err != nil {
		t.Fatal(err)
	}
	return k, info.ID
}

func wantOpenError(t testing.TB, r *Repo, want error, opts ...Option) {
	t.Helper()
	o, err := Open(t.Context(), r.Location(), opts...)
	if err == nil {
		_ = o.Close()
	}
	if !errors.Is(err, want) {
		t.Errorf("Open: %v, want %v", err, want)
	}
}

func TestOpenWithoutAFittingKey(t *testing.T) {
	r := encryptedRepo(t)
	wantOpenError(t, r, ErrKey)
	wantOpenError(t, r, ErrKey, WithKey(Passphrase("correct Horse")))
	wantOpenError(t, r, ErrKey, WithKey(Passphrase("")))
	stranger, err := NewKeyFile()
	if err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, r, ErrKey, WithKey(stranger))
	if err := r.Trust(stranger); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, r, ErrKey, WithKey(stranger))
	asked := errors.New("asked")
	wantOpenError(t, r, asked, AskKey(func(context.Context) (Key, error) { return nil, asked }))
	openWith(t, r, testPassphrase)

	if _, err := Init(t.Context(), t.TempDir(), Encrypt(NewKey{Role: FullKey, Passphrase: Passphrase("")})); !errors.Is(err, ErrInvalid) {
		t.Errorf("Init with an empty passphrase: %v", err)
	}
	if _, err := Init(t.Context(), t.TempDir(), Encrypt(NewKey{Role: WriterKey, Passphrase: testPassphrase})); !errors.Is(err, ErrInvalid) {
		t.Errorf("Init with a writer's key alone: %v", err)
	}
}

// Whoever can write to the storage must not get a source host to store in the clear.
func TestConfigThatSaysNotEncryptedIsRefused(t *testing.T) {
	r := encryptedRepo(t)
	c := r.config
	c.Encryption.Mode = encryptionNone
	doc, err := encodeConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Location(), configName), doc, 0o600); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, r, ErrNotEncrypted, WithKey(testPassphrase))
	ask := AskKey(func(context.Context) (Key, error) { return testPassphrase, nil })
	wantOpenError(t, r, ErrNotEncrypted, ask, MustBeEncrypted())
}

func TestKnownPlaintextIsNowhere(t *testing.T) {
	known := [][]byte{[]byte("the quick brown fox"), []byte("vm-with-a-name"), []byte("disk-name"), []byte("/dev/source"), []byte("change-id"), []byte("evidence!")}
	for _, r := range []*Repo{encryptedRepo(t), plainRepo(t)} {
		w, err := r.Begin(t.Context(), "vm-with-a-name")
		if err != nil {
			t.Fatal(err)
		}
		// Incompressible but for the words, so that a plain repository shows them.
		image := noise(1, 1<<20)
		for off := 0; off < len(image); off += 4096 {
			copy(image[off:], known[0])
		}
		d, err := w.Disk(t.Context(), DiskOptions{Name: "disk-name", Source: "/dev/source", Size: 1 << 20, Grain: 4096})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Write(t.Context(), 0, image); err != nil {
			t.Fatal(err)
		}
		p := testPoint("disk-name")
		p.Disks[0].ChangeID = "change-id"
		p.Disks[0].Tracking.Evidence = json.RawMessage(`["evidence!"]`)
		if _, err := w.Commit(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		ids := [][]byte{plainHasher.sum(image[:4096]).bytes(), r.HashGrain(image[:4096]).bytes()}
		seen := make([]bool, len(known))
		err = filepath.WalkDir(r.Location(), func(file string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			b := []byte(file)
			if e.Type().IsRegular() {
				content, err := os.ReadFile(file)
				if err != nil {
					return err
				}
				b = append(b, content...)
			}
			for i, k := range known {
				seen[i] = seen[i] || bytes.Contains(b, k) || bytes.Contains(b, []byte(hex.EncodeToString(k)))
			}
			for _, id := range ids {
				if r.Encrypted() && (bytes.Contains(b, id) || bytes.Contains(b, []byte(hex.EncodeToString(id)))) {
					t.Errorf("%s has the identity of a grain", file)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for i, k := range known {
			if seen[i] == r.Encrypted() { // what is not found in a plain repository would prove nothing
				t.Errorf("encrypted %v: %q is found: %v", r.Encrypted(), k, seen[i])
			}
		}
	}
}

func (h Hash) bytes() []byte { return h[:] }

func plainRepo(t testing.TB) *Repo {
	t.Helper()
	r, err := Init(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r.dataPackLen, r.nodePackLen = 64<<10, 8<<10
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func TestSameContentHasOtherIDsInOtherRepositories(t *testing.T) {
	a, b := encryptedRepo(t), encryptedRepo(t)
	image := noise(1, 3*k64)
	pa, pb := backup(t, a, DiskOptions{Size: 1 << 20}, write{0, image}), backup(t, b, DiskOptions{Size: 1 << 20}, write{0, image})
	ra, err := a.newMapLookup(t, pa, 1)
	if err != nil {
		t.Fatal(err)
	}
	rb, err := b.newMapLookup(t, pb, 1)
	if err != nil {
		t.Fatal(err)
	}
	plain := plainHasher.sum(image[k64 : 2*k64])
	if ra.Hash == rb.Hash || ra.Hash == plain || pa.Disks[0].Root.Ref.Hash == pb.Disks[0].Root.Ref.Hash {
		t.Errorf("identities %s and %s; not keyed: %s", ra.Hash, rb.Hash, plain)
	}
	if a.pointFolder("a") == b.pointFolder("a") || a.pointFolder("a") == a.pointFolder("b") || strings.Contains(a.pointFolder("web"), "web") {
		t.Error("folders of VMs")
	}
}

func TestSizesSayLittle(t *testing.T) {
	for _, c := range []struct{ n, step, want int }{
		{1, 1 << 20, 256}, {300, 1 << 20, 512}, {4097, 1 << 20, 4352}, {100_000, 1 << 20, 100_352}, {100_353, 1 << 20, 102_400},
		{33_100_000, 1 << 20, 33_554_432}, {33_100_000, 32 << 10, 33_128_448},
	} {
		if got := padded(c.n, c.step); got != c.want {
			t.Errorf("padded(%d, %d) = %d, want %d", c.n, c.step, got, c.want)
		}
	}
	r := encryptedRepo(t)
	// Compressed to lengths that differ by a few bytes: the objects do not.
	sizes := map[string]map[int64]bool{}
	for i := range uint64(20) {
		seen := map[string]bool{}
		for _, n := range objects(t, r) {
			seen[n] = true
		}
		p := noise(i, 4096)
		clear(p[2000+i:])
		backup(t, r, DiskOptions{Size: 1 << 20, Grain: 4096}, write{int64(i) * 4096, p})
		for _, n := range objects(t, r) {
			st, err := os.Stat(filepath.Join(r.Location(), n))
			if err != nil {
				t.Fatal(err)
			}
			if seen[n] {
				continue
			}
			if st.Size()%128 != 0 {
				t.Errorf("%s has %d bytes", n, st.Size())
			}
			if kind, _, _ := strings.Cut(n, "/"); kind == "packs" {
				b, err := os.ReadFile(filepath.Join(r.Location(), n))
				if err != nil {
					t.Fatal(err)
				}
				if packKind(b[9]) == kindData {
					if sizes["data"] == nil {
						sizes["data"] = map[int64]bool{}
					}
					sizes["data"][st.Size()] = true
				}
			}
		}
	}
	if len(sizes["data"]) != 1 {
		t.Errorf("sizes of data packs: %v", sizes)
	}
}

func TestWriterKeyWritesAndCantRead(t *testing.T) {
	full := encryptedRepo(t)
	image := noise(1, 3*k64)
	p1 := backup(t, full, DiskOptions{Size: 4 << 20}, write{0, image}, write{1 << 20, text(5, k64)})
	k, _ := addFile(t, full, WriterKey)
	w := openWith(t, full, k)
	if !errors.Is(w.CanRead(), ErrWriterKey) || full.CanRead() != nil {
		t.Errorf("CanRead: %v, %v", w.CanRead(), full.CanRead())
	}

	// It continues what is there: the unchanged is found by identity.
	p2 := backup(t, w, DiskOptions{Size: 4 << 20, Dedup: true}, write{0, image}, write{2 << 20, text(5, k64)}, write{3 << 20, noise(9, k64)})
	if s := p2.Disks[0].Stats; s.Changed != 2*k64 || s.New != k64 {
		t.Errorf("stats of the writer's point: %+v", s)
	}
	want := make([]byte, 4<<20)
	copy(want, image)
	copy(want[1<<20:], text(5, k64))
	copy(want[2<<20:], text(5, k64))
	copy(want[3<<20:], noise(9, k64))
	wantDisk(t, reopenFull(t, full), p2, want)
	wantClean(t, full, p2)
	if rep, err := w.Verify(t.Context(), p2, false, nil); err != nil || !rep.OK() {
		t.Errorf("quick verify with a writer's key: %v, %+v", err, rep)
	}

	// What it wrote itself it can't read either.
	m, err := w.Map(p2.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	grains := 0
	for g := range m.Grains() {
		ref, err := m.Lookup(t.Context(), g)
		if err != nil {
			t.Fatal(err)
		}
		if ref.IsZero() {
			continue
		}
		grains++
		dst := []byte(strings.Repeat("x", k64))
		if err := w.ReadGrain(t.Context(), ref, dst); !errors.Is(err, ErrWriterKey) || errors.Is(err, ErrCorrupt) || !allZero(dst) {
			t.Fatalf("grain %d: %v", g, err)
		}
		tryAllKeys(t, w, full, ref)
	}
	if grains != 6 {
		t.Errorf("%d grains", grains)
	}

	// Nor can it change keys, or make others trust.
	for what, err := range map[string]error{
		"add":    second(w.AddKey(t.Context(), NewKey{Role: FullKey, Passphrase: Passphrase("x")})),
		"remove": w.RemoveKey(t.Context(), "0"),
		"rotate": last(w.RotateKeys(t.Context())),
		"export": last(w.ExportKeys(t.Context())),
	} {
		if !errors.Is(err, ErrWriterKey) {
			t.Errorf("%s: %v", what, err)
		}
	}
	wantDisk(t, full, p1, append(append(append(bytes.Clone(image), make([]byte, 1<<20-3*k64)...), text(5, k64)...), make([]byte, 3<<20-k64)...))
}

func last[T any](_ T, err error) error           { return err }
func second[A, B any](_ A, _ B, err error) error { return err }

func reopenFull(t testing.TB, r *Repo) *Repo { return openWith(t, r, testPassphrase) }

// tryAllKeys tries to open a grain's pack with every secret that a writer has. With the content key
// it must succeed, or the attempt would prove nothing.
func tryAllKeys(t *testing.T, w, full *Repo, ref Ref) {
	t.Helper()
	ring := w.keys.state.Load().ring
	if ring.Signing != nil || ring.Names != nil {
		t.Error("a writer's ring has the signing key or names")
	}
	secrets := [][]byte{ring.Identity[:], w.keys.nameKey[:], w.keys.ids.key, w.keys.nameTag.key}
	for _, g := range ring.Generations {
		if g.ContentPrivate != nil {
			t.Error("a writer's ring has a private key")
		}
		secrets = append(secrets, g.Meta[:])
	}
	own, err := w.keys.opener.private.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	secrets = append(secrets, own)
	open := func(seed []byte) bool {
		private, err := kem().NewPrivateKey(seed)
		if err != nil {
			t.Fatal(err)
		}
		x, err := w.index(t.Context(), ref.Pack)
		if err != nil {
			t.Fatal(err)
		}
		s := &packSeal{g: &keySet{private: private}, head: x.seal.head}
		_, err = s.open()
		if err == nil {
			return true
		}
		e, _ := x.entry(ref.Ord)
		stored := make([]byte, e.stored)
		if err := w.readFull(t.Context(), packName(ref.Pack), stored, int64(e.off)); err != nil {
			t.Fatal(err)
		}
		nonce, aad := recordParams(new([unsealScratch]byte), x.seal.head, ref.Ord, e.raw, e.codec)
		_, err = newGCM([32]byte(seed)).Open(nil, nonce, stored, aad)
		return err == nil
	}
	for i, s := range secrets {
		if open(s) {
			t.Errorf("secret %d of a writer opens a grain", i)
		}
	}
	if !open(full.keys.state.Load().ring.Generations[0].ContentPrivate[:]) {
		t.Error("the content key does not open a grain")
	}
}

func TestWriterKeyOnADiskThatShrank(t *testing.T) {
	full := encryptedRepo(t)
	k, _ := addFile(t, full, WriterKey)
	w := openWith(t, full, k)
	image := noise(1, 1<<20)
	backup(t, w, DiskOptions{Size: 1 << 20, Grain: 4096}, write{0, image})

	// Cut within a grain, which only a reader could cut: it has to be written.
	const small = 500_000
	o := DiskOptions{Name: "disk0", Size: small, Grain: 4096}
	b, err := w.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Disk(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Commit(t.Context(), testPoint("disk0")); !errors.Is(err, ErrWriterKey) {
		t.Errorf("Commit without the last grain: %v", err)
	}
	if err := b.Abort(); err != nil {
		t.Fatal(err)
	}
	at := int64(small / 4096 * 4096)
	p := backup(t, w, o, write{at, image[at:small]})
	wantDisk(t, full, p, image[:small])
	wantClean(t, full, p)
	// Between grains nothing has to be read.
	o.Size = 409_600
	p = backup(t, w, o)
	wantDisk(t, full, p, image[:o.Size])
}

func TestRotatedKeys(t *testing.T) {
	r := encryptedRepo(t)
	writer, id := addFile(t, r, WriterKey)
	w := openWith(t, r, writer) // stays open over all that follows
	image := noise(1, 2*k64)
	p1 := backup(t, w, DiskOptions{Size: 1 << 20}, write{0, image})
	exported, err := r.ExportKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stale := r.keys.state.Load()

	if n, err := r.RotateKeys(t.Context()); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	before := packFiles(t, r)
	p2 := backup(t, w, DiskOptions{Size: 1 << 20, Dedup: true}, write{0, image}, write{k64 * 4, noise(2, k64)}, write{k64 * 8, image[:k64]})
	if s := p2.Disks[0].Stats; s.New != k64 {
		t.Errorf("rotation made content new: %+v", s)
	}
	for _, n := range packFiles(t, r) {
		b, err := os.ReadFile(filepath.Join(r.Location(), n))
		if err != nil {
			t.Fatal(err)
		}
		want := uint32(2)
		if slices.Contains(before, n) {
			want = 1
		}
		if packKeys(b) != want {
			t.Errorf("%s is of generation %d, want %d", n, packKeys(b), want)
		}
	}
	copyOf := bytes.Clone(image)
	want := make([]byte, 1<<20)
	copy(want, copyOf)
	copy(want[k64*4:], noise(2, k64))
	copy(want[k64*8:], copyOf[:k64])
	for _, full := range []*Repo{r, reopenFull(t, r)} {
		wantDisk(t, full, p2, want)
		wantClean(t, full, p1)
		wantClean(t, full, p2)
	}

	// Keys exported before open what was written before, and know that there is more.
	old := openWith(t, r, exported)
	wantClean(t, old, p1)
	if _, err := old.Point(t.Context(), p2.Name()); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "generation 2") {
		t.Errorf("newer point with older keys: %v", err)
	}
	if _, err := old.RotateKeys(t.Context()); !errors.Is(err, ErrKey) {
		t.Errorf("rotation with older keys: %v", err)
	}

	// A removed key opens nothing any more, also where it is open already.
	if err := r.RemoveKey(t.Context(), id[:6]); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, r, ErrKey, WithKey(writer))
	if _, err := w.Begin(t.Context(), "a"); !errors.Is(err, ErrKey) {
		t.Errorf("Begin with a removed key: %v", err)
	}
	if _, err := r.RotateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	p3 := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(3, k64)})
	if _, err := w.Point(t.Context(), p3.Name()); !errors.Is(err, ErrKey) {
		t.Errorf("removed key, object sealed after the rotation: %v", err)
	}
	if stale.byNum[3] != nil || stale.byNum[2] != nil {
		t.Error("old keys know new generations")
	}
	l, err := reopenFull(t, r).Keys(t.Context())
	if err != nil || l.Generation != 3 || len(l.Keys) != 1 || l.Keys[0].Name != "first" || !l.Keys[0].Own || l.Keys[0].Role != FullKey || len(l.Old)+len(l.Unsigned) != 0 {
		t.Errorf("keys: %+v, %v", l, err)
	}
	if err := r.RemoveKey(t.Context(), l.Keys[0].ID); !errors.Is(err, ErrInvalid) {
		t.Errorf("removal of the last full key: %v", err)
	}
	if err := r.RemoveKey(t.Context(), "zz"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removal of nothing: %v", err)
	}
}

// forgeKeys puts a keys document that is signed by somebody else, with a ring of theirs in every slot.
func forgeKeys(t *testing.T, r *Repo, number uint64) {
	t.Helper()
	docs, err := listKeyDocs(t.Context(), r.blobs)
	if err != nil {
		t.Fatal(err)
	}
	d, err := readKeyDoc(t.Context(), r.blobs, docs[0], r.repo)
	if err != nil {
		t.Fatal(err)
	}
	evil, err := newRing(r.repo)
	if err != nil {
		t.Fatal(err)
	}
	f := d.keyDoc
	f.Number = number
	for i := range f.Slots {
		if err := f.Slots[i].seal(evil, &f, r.repo); err != nil {
			t.Fatal(err)
		}
	}
	for _, anchor := range []key32{f.Anchor, evil.anchor()} { // one that is known, one that is theirs
		f.Anchor = anchor
		doc, err := f.encode(evil.signer())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(r.Location(), keyDocName(f.Number)), doc, 0o600); err != nil {
			t.Fatal(err)
		}
		f.Number++
	}
}

func TestForgedKeysAreNotTaken(t *testing.T) {
	r := encryptedRepo(t)
	writer, _ := addFile(t, r, WriterKey)
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	identity := r.keys.state.Load().ring.Identity
	forgeKeys(t, r, 7)
	if err := os.WriteFile(filepath.Join(r.Location(), keyDocName(9)), []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, k := range []Key{testPassphrase, writer} {
		o := openWith(t, r, k)
		if o.keys.state.Load().ring.Identity != identity {
			t.Error("somebody else's keys were taken")
		}
	}
	full := reopenFull(t, r)
	wantClean(t, full, p)
	l, err := full.Keys(t.Context())
	if err != nil || len(l.Unsigned) != 3 || len(l.Keys) != 2 {
		t.Errorf("keys: %+v, %v", l, err)
	}
	// The next change is numbered above them and clears them away.
	if _, err := full.RotateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	if l, err = reopenFull(t, r).Keys(t.Context()); err != nil || len(l.Unsigned) != 0 || l.Generation != 2 {
		t.Errorf("keys: %+v, %v", l, err)
	}
	if o := openWith(t, r, writer); o.keys.newest().number != 2 {
		t.Error("the writer's key was not rotated")
	}

	// Without a document that is signed nothing opens, and that is damage.
	docs, err := listKeyDocs(t.Context(), r.blobs)
	if err != nil {
		t.Fatal(err)
	}
	forgeKeys(t, r, 100)
	if err := r.blobs.Delete(t.Context(), docs[0].name); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, r, ErrCorrupt, WithKey(writer))
	wantOpenError(t, r, ErrCorrupt, WithKey(testPassphrase))
}

func TestOldKeysPutBackAreNoticedByWhoIsOpen(t *testing.T) {
	r := encryptedRepo(t)
	old, err := os.ReadFile(filepath.Join(r.Location(), keyDocName(1)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.RotateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	if err := r.blobs.Delete(t.Context(), keyDocName(2)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Location(), keyDocName(1)), old, 0o600); err != nil {
		t.Fatal(err)
	}
	wantClean(t, r, p) // has the newer keys
	if _, err := reopenFull(t, r).Point(t.Context(), p.Name()); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "older state") {
		t.Errorf("with the older keys: %v", err)
	}
}

func TestLostKeysAreMadeAnewFromExportedOnes(t *testing.T) {
	r := encryptedRepo(t)
	p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	k, err := r.ExportKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	text, err := k.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if k, err = ParseKeyFile(text); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(r.Location(), "keys")); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, r, ErrCorrupt, WithKey(testPassphrase))
	o := openWith(t, r, k)
	wantClean(t, o, p)
	if _, _, err := o.AddKey(t.Context(), NewKey{Role: FullKey, Passphrase: Passphrase("new")}); err != nil {
		t.Fatal(err)
	}
	n := openWith(t, r, Passphrase("new"))
	wantClean(t, n, p)
	if _, err := n.RotateKeys(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestConcurrentChangesOfKeys(t *testing.T) {
	r := encryptedRepo(t)
	// Both have read the same document: the second must not undo the first.
	f := &beforePut{Store: r.blobs}
	r.blobs = f
	other := reopenFull(t, r)
	f.do = func() {
		if _, _, err := other.AddKey(t.Context(), NewKey{Role: FullKey, Passphrase: Passphrase("other")}); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.RotateKeys(t.Context()); !errors.Is(err, ErrExists) {
		t.Errorf("rotation beside another change: %v", err)
	}
	openWith(t, r, Passphrase("other"))
	if n, err := r.RotateKeys(t.Context()); n != 2 || err != nil {
		t.Errorf("second attempt: %d, %v", n, err)
	}
	openWith(t, r, Passphrase("other"))
}

// beforePut calls do once, before the first Put.
type beforePut struct {
	blob.Store
	do func()
}

func (b *beforePut) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if do := b.do; do != nil {
		b.do = nil
		do()
	}
	return b.Store.Put(ctx, name, r, size)
}

// Keys that change while they are looked for are found all the same.
func TestKeysThatMoveAreFollowed(t *testing.T) {
	r := encryptedRepo(t)
	file, _ := addFile(t, r, FullKey)
	for _, k := range []Key{testPassphrase, file} {
		other := reopenFull(t, r)
		b := &beforeGet{Store: r.blobs, name: keyPrefix}
		for range 2 {
			b.do = append(b.do, func() {
				if _, err := other.RotateKeys(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		o := options{key: k}
		ring, err := o.open(t.Context(), b, r.config)
		if err != nil || len(b.do) != 0 || ring.newest().number != other.keys.newest().number {
			t.Errorf("%T: %v, %d changes left", k, err, len(b.do))
		}
	}
}

// beforeGet calls do, one by one, before Gets of names that begin so.
type beforeGet struct {
	blob.Store
	name string
	do   []func()
}

func (b *beforeGet) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	if strings.HasPrefix(name, b.name) && len(b.do) > 0 {
		do := b.do[0]
		b.do = b.do[1:]
		do()
	}
	return b.Store.Get(ctx, name, off, n)
}

// Killed between any two operations, a change of keys is made or not, and the repository opens.
func TestKeyChangeCutShort(t *testing.T) {
	stop := errors.New("killed")
	for put := range 2 {
		for del := range 2 {
			r := encryptedRepo(t)
			p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
			r.blobs = &cutStore{r.blobs, put == 1, del == 1, stop}
			_, err := r.RotateKeys(t.Context())
			if (err != nil) != (put+del > 0) || err != nil && !errors.Is(err, stop) {
				t.Errorf("put %d, delete %d: %v", put, del, err)
			}
			o := reopenFull(t, r)
			wantClean(t, o, p)
			if want := uint32(2 - put); o.keys.newest().number != want {
				t.Errorf("put %d, delete %d: generation %d, want %d", put, del, o.keys.newest().number, want)
			}
			l, err := o.Keys(t.Context())
			if err != nil || (len(l.Old) == 1) != (put == 0 && del == 1) {
				t.Errorf("put %d, delete %d: %+v, %v", put, del, l, err)
			}
		}
	}
}

// cutStore fails Puts or Deletes.
type cutStore struct {
	blob.Store
	put, del bool
	err      error
}

func (c *cutStore) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	if c.put {
		return c.err
	}
	return c.Store.Put(ctx, name, r, size)
}

func (c *cutStore) Delete(ctx context.Context, name string) error {
	if c.del {
		return c.err
	}
	return c.Store.Delete(ctx, name)
}

func TestInitThatWasKilledCanBeRepeated(t *testing.T) {
	r := encryptedRepo(t)
	if err := os.Remove(filepath.Join(r.Location(), configName)); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, r, ErrNotRepository, WithKey(testPassphrase))
	n, err := Init(t.Context(), r.Location(), Encrypt(NewKey{Role: FullKey, Passphrase: Passphrase("new")}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = n.Close() }()
	backup(t, n, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	if err := os.Remove(filepath.Join(r.Location(), configName)); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), r.Location()); !errors.Is(err, ErrExists) {
		t.Errorf("Init over what holds data: %v", err)
	}
}

// TestMixedObjectsAreSeen puts, in the place of each object, every other one of its kind, of the same repository and of
// one with the same passphrase, and parts of them.
func TestMixedObjectsAreSeen(t *testing.T) {
	r, other := encryptedRepo(t), encryptedRepo(t)
	points := map[string]*Point{}
	for _, x := range []*Repo{r, other} {
		for i := range uint64(2) {
			p := backup(t, x, DiskOptions{Size: 1 << 20, Grain: 4096}, write{0, noise(i, 3*4096)}, write{1 << 19, text(i, 4096)})
			points[x.pointObject(p.Name())] = p
		}
	}
	dir := t.TempDir()
	files := map[string][]byte{}
	for i, x := range []*Repo{r, other} {
		for _, n := range objects(t, x) {
			b, err := os.ReadFile(filepath.Join(x.Location(), n))
			if err != nil {
				t.Fatal(err)
			}
			files[fmt.Sprintf("%d/%s", i, n)] = b
		}
	}
	if err := os.CopyFS(filepath.Join(dir, "r"), os.DirFS(r.Location())); err != nil {
		t.Fatal(err)
	}
	readAllPoints := func() error {
		o, err := Open(t.Context(), filepath.Join(dir, "r"), WithKey(testPassphrase))
		if err != nil {
			return err
		}
		defer func() { _ = o.Close() }()
		names, err := o.Points(t.Context(), "a")
		if err != nil {
			return err
		}
		if len(names) != 2 {
			return fmt.Errorf("%d points", len(names))
		}
		for _, n := range names {
			p, err := o.Point(t.Context(), n)
			if err != nil {
				return err
			}
			if _, err := readDisk(t.Context(), o, p.Disks[0].Root); err != nil {
				return err
			}
		}
		_, err = o.sessions(t.Context()) // as a collection does
		return err
	}
	if err := readAllPoints(); err != nil {
		t.Fatal(err)
	}
	tried := 0
	try := func(name, what string, b []byte) {
		file := filepath.Join(dir, "r", name)
		was := files["0/"+name]
		if bytes.Equal(b, was) {
			return
		}
		tried++
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := readAllPoints(); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), name) {
			// The other repository's config and keys together could open; alone none does.
			t.Errorf("%s in the place of %s: %v", what, name, err)
		}
		if err := os.WriteFile(file, was, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kind := func(n string) string { k, _, _ := strings.Cut(n[2:], "/"); return k }
	for n, b := range files {
		if n[0] != '0' || n == "0/config" || strings.HasSuffix(n, doneSuffix) { // nobody reads what is in the last
			continue
		}
		name := n[2:]
		for m, c := range files {
			if m == n || kind(m) != kind(n) {
				continue
			}
			try(name, m, c)
			// The beginning of one and the end of the other.
			for _, at := range []int{48, packHeaderLen + capsuleLen, len(b) / 2, len(b) - packFooterLen, len(b) - packFooterLen - 200} {
				if at > 0 && at < min(len(b), len(c)) {
					try(name, m+" from its middle on", append(bytes.Clone(b[:at]), c[at:]...))
					try(name, m+" to its middle", append(bytes.Clone(c[:at]), b[at:]...))
				}
				if at > 0 && at < len(b) && len(b)-at < len(c) {
					try(name, m+" with this one's end", append(bytes.Clone(c[:len(c)-(len(b)-at)]), b[at:]...))
				}
			}
		}
		// Records of one pack, exchanged.
		if kind(n) == "packs" {
			x, err := r.loadIndex(t.Context(), packOf(t, name))
			if err != nil {
				t.Fatal(err)
			}
			e0, _ := x.entry(0)
			for i := 1; i < x.count(); i++ {
				if e, _ := x.entry(uint32(i)); e.stored == e0.stored {
					mixed := bytes.Clone(b)
					copy(mixed[e.off:e.off+e.stored], b[e0.off:e0.off+e0.stored])
					copy(mixed[e0.off:e0.off+e0.stored], b[e.off:e.off+e.stored])
					try(name, "itself with records exchanged", mixed)
				}
			}
		}
	}
	t.Logf("%d ways to mix", tried)
	if tried < 100 {
		t.Errorf("only %d ways to mix were tried", tried)
	}
	if err := readAllPoints(); err != nil {
		t.Errorf("after all was undone: %v", err)
	}
}

func packOf(t testing.TB, name string) (id PackID) {
	t.Helper()
	if err := id.UnmarshalText([]byte(filepath.Base(name))); err != nil {
		t.Fatal(err)
	}
	return id
}

// An index and records that only somebody with the pack's key could have exchanged: the AEAD itself, without the
// CRC, has to see that a record is not in its place.
func TestRecordIsBoundToItsPlace(t *testing.T) {
	r := encryptedRepo(t)
	b := builder(t, r, kindData, newPackID())
	for i := range uint64(3) {
		p := noise(i, 4096)
		b.add(p, 4096, codecRaw, r.ids.sum(p))
	}
	doc := b.finish()
	rd, err := newReader(&oneObject{nil, doc}, r.repo, r.codec, r.keys)
	if err != nil {
		t.Fatal(err)
	}
	x, err := rd.index(t.Context(), b.id)
	if err != nil {
		t.Fatal(err)
	}
	e1, _ := x.entry(1)
	open := func(ord uint32, e packEntry) error {
		_, err := x.unseal(nil, doc[e1.off:e1.off+e1.stored], ord, &e)
		return err
	}
	if err := open(1, e1); err != nil {
		t.Fatal(err)
	}
	longer, other := e1, e1
	longer.raw++
	other.codec = codecGCM | codecZstd
	for what, err := range map[string]error{"ordinal": open(2, e1), "raw length": open(1, longer), "codec": open(1, other)} {
		if err == nil {
			t.Errorf("another %s was not seen", what)
		}
	}
}

func TestHiddenNames(t *testing.T) {
	r := encryptedRepo(t)
	for _, n := range []string{"a", "web-1", strings.Repeat("x", 64)} {
		h := r.keys.hideName(n)
		if got, ok := r.keys.showName(h); !ok || got != n || len(h) != 160 || r.keys.hideName(n) != h {
			t.Errorf("%q is hidden as %s and shown as %q", n, h, got)
		}
		if !blob.ValidName(r.pointFolder(n)+"x") || !blob.ValidName("vm-"+h) {
			t.Errorf("%s is no name", h)
		}
		for i := range len(h) {
			c := []byte(h)
			c[i] ^= 1
			if c[i] < '0' || c[i] == '`' || c[i] == 'g' || c[i] == ':' {
				continue
			}
			if got, ok := r.keys.showName(string(c)); ok {
				t.Errorf("changed digit %d shows %q", i, got)
			}
		}
	}
	// Foreign folders are no VMs.
	if err := os.MkdirAll(filepath.Join(r.Location(), "points", "web-1"), 0o700); err != nil {
		t.Fatal(err)
	}
	backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)})
	if vms, err := r.VMs(t.Context()); err != nil || !slices.Equal(vms, []string{"a"}) {
		t.Errorf("VMs: %v, %v", vms, err)
	}
}

func TestKeyFilesSurviveTheirText(t *testing.T) {
	r := encryptedRepo(t)
	k, _ := addFile(t, r, FullKey)
	text, err := k.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseKeyFile(append([]byte(keyFileMagic+"\n\n# of web1\n"), text[len(keyFileMagic)+1:]...))
	if err != nil {
		t.Fatal(err)
	}
	openWith(t, r, again)
	for _, bad := range []string{"", "tidemark-key 2\n", keyFileMagic, keyFileMagic + "\nsecret 00\n", keyFileMagic + "\nwhat x\n", string(text) + "secret " + strings.Repeat("0", 64)} {
		if _, err := ParseKeyFile([]byte(bad)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", publicKeyMagic, publicKeyMagic + "\nkey AAAA\n"} {
		if _, err := ParsePublicKey([]byte(bad)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// A document that opens is signed: nobody else's costs are paid but within bounds.
func TestCostsOfPassphrasesAreBounded(t *testing.T) {
	for _, a := range []argon2Params{
		{Salt: make([]byte, 31), Time: 1, Memory: 8, Threads: 1}, {Salt: make([]byte, 32), Memory: 8, Threads: 1},
		{Salt: make([]byte, 32), Time: 1, Memory: 7, Threads: 1}, {Salt: make([]byte, 32), Time: 1, Memory: 8},
		{Salt: make([]byte, 32), Time: 17, Memory: 8, Threads: 1}, {Salt: make([]byte, 32), Time: 1, Memory: 1 << 22, Threads: 1},
		{Salt: make([]byte, 32), Time: 1, Memory: 1 << 20, Threads: 17},
	} {
		if a.check() == nil {
			t.Errorf("%+v is accepted", a)
		}
	}
}

// The signature is over the hash of the document, and by whom it is known to be.
func TestSignature(t *testing.T) {
	r := encryptedRepo(t)
	b, err := os.ReadFile(filepath.Join(r.Location(), keyDocName(1)))
	if err != nil {
		t.Fatal(err)
	}
	d, err := decodeKeyDoc(b, 1, r.repo)
	if err != nil {
		t.Fatal(err)
	}
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	anchor := r.keys.state.Load().ring.anchor()
	if !d.signedBy(anchor) || d.signedBy(key32(public)) {
		t.Error("signature")
	}
	d.signature[0] ^= 1
	if d.signedBy(anchor) {
		t.Error("another signature")
	}
}

// One range of bytes may be wanted for several places: nothing is opened in its place.
func TestSameGrainsAtOnce(t *testing.T) {
	r := encryptedRepo(t)
	image := slices.Concat(text(1, k64), text(2, k64), noise(3, k64))
	p := backup(t, r, DiskOptions{Size: 3 * k64}, write{0, image})
	r = reopenFull(t, r)
	var refs []Ref
	for i := range int64(30) {
		ref, err := r.newMapLookup(t, p, i%3)
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ref)
	}
	dst := make([][]byte, len(refs))
	for i := range dst {
		dst[i] = make([]byte, k64)
	}
	r.ReadGrains(t.Context(), refs, dst, func(i int, err error) {
		if err != nil || !bytes.Equal(dst[i], image[i%3*k64:][:k64]) {
			t.Errorf("grain %d: %v", i, err)
		}
	})
}

func TestNoMemoryPerGrainForSealing(t *testing.T) {
	if testing.Short() {
		t.Skip("measures")
	}
	var allocs [2]float64
	for i, r := range []*Repo{plainRepo(t), encryptedRepo(t)} {
		p := backup(t, r, DiskOptions{Size: 1 << 20}, write{0, noise(1, k64)}, write{k64, text(1, k64)})
		dst := make([]byte, k64)
		for g := range int64(2) {
			ref, err := r.newMapLookup(t, p, g)
			if err != nil {
				t.Fatal(err)
			}
			allocs[i] += testing.AllocsPerRun(200, func() {
				if err := r.ReadGrain(t.Context(), ref, dst); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
	if allocs[1] > allocs[0]+1.5 { // the race detector lets pools forget
		t.Errorf("reading two grains: %.1f allocations sealed, %.1f plain", allocs[1], allocs[0])
	}
	t.Logf("reading two grains: %.1f allocations sealed, %.1f plain", allocs[1], allocs[0])
}

func TestDocumentIsBoundToItsName(t *testing.T) {
	r := encryptedRepo(t)
	sealed := r.keys.sealDoc("points/a/1", []byte("document"))
	if doc, err := r.keys.openDoc(t.Context(), r.blobs, "points/a/1", sealed); err != nil || string(doc) != "document" {
		t.Fatal(string(doc), err)
	}
	if _, err := r.keys.openDoc(t.Context(), r.blobs, "points/a/2", sealed); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "points/a/2") {
		t.Errorf("under another name: %v", err)
	}
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		if _, err := r.keys.openDoc(t.Context(), r.blobs, "points/a/1", bad); !errors.Is(err, ErrCorrupt) {
			t.Errorf("byte %d of %d: %v", i, len(bad), err)
		}
	}
}

// All of a pack but its records is seen when its index is opened.
func TestIndexCoversHeaderCapsuleAndFooter(t *testing.T) {
	r := encryptedRepo(t)
	for _, kind := range []packKind{kindData, kindNode} {
		b, err := newPackBuilder(nil, kind, newPackID(), r.repo, r.keys)
		if err != nil {
			t.Fatal(err)
		}
		b.add(noise(1, 1000), 1000, codecRaw, r.ids.sum(noise(1, 1000)))
		doc := b.finish()
		end := int(recordsAt(kind)) + 1000 + sealLen
		load := func() error {
			rd, err := newReader(&oneObject{r.blobs.(*blob.Dir), doc}, r.repo, r.codec, r.keys)
			if err != nil {
				t.Fatal(err)
			}
			_, err = rd.index(t.Context(), b.id)
			return err
		}
		if err := load(); err != nil {
			t.Fatal(err)
		}
		for i := range doc {
			if i >= int(recordsAt(kind)) && i < end {
				continue
			}
			doc[i] ^= 4
			if err := load(); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s pack, byte %d of %d: %v", kind, i, len(doc), err)
			}
			doc[i] ^= 4
		}
	}
}
