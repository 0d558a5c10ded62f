package store_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hpke"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/argon2"
	"lukechampine.com/blake3"

	"github.com/tidemark/tidemark/store"
)

// formatReader reads a repository by the words of docs/format.md alone. It panics on what it
// does not understand.
type formatReader struct {
	dir       string
	repo      []byte
	encrypted bool

	hashKey, nameTag, nameKey []byte
	gens                      map[uint32]formatGeneration
}

type formatGeneration struct {
	meta    []byte
	private hpke.PrivateKey
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func check(ok bool, what string, a ...any) {
	if !ok {
		panic(fmt.Sprintf(what, a...))
	}
}

func unhex(s string) []byte    { return must(hex.DecodeString(s)) }
func unbase64(s string) []byte { return must(base64.StdEncoding.DecodeString(s)) }

func cat(parts ...any) (b []byte) {
	for _, p := range parts {
		switch p := p.(type) {
		case []byte:
			b = append(b, p...)
		case string:
			b = append(b, p...)
		case byte:
			b = append(b, p)
		case uint32:
			b = binary.LittleEndian.AppendUint32(b, p)
		case uint64:
			b = binary.LittleEndian.AppendUint64(b, p)
		default:
			panic("cat")
		}
	}
	return b
}

func plainB(p []byte) []byte { h := blake3.Sum256(p); return h[:] }

func keyedB(key, p []byte) []byte {
	h := blake3.New(32, key)
	_ = must(h.Write(p))
	return h.Sum(nil)
}

func deriveD(c string, material ...any) []byte {
	k := make([]byte, 32)
	blake3.DeriveKey(k, c, cat(material...))
	return k
}

func openGCM(key, nonce, aad, sealed []byte) []byte {
	if nonce == nil {
		nonce = make([]byte, 12)
	}
	return must(must(cipher.NewGCM(must(aes.NewCipher(key)))).Open(nil, nonce, sealed, aad))
}

func openHPKE(k hpke.PrivateKey, info string, aad, b []byte) []byte {
	r := must(hpke.NewRecipient(b[:1120], k, must(hpke.NewKDF(1)), must(hpke.NewAEAD(2)), []byte(info)))
	return must(r.Open(aad, b[1120:]))
}

func privateKey(seed []byte) hpke.PrivateKey {
	return must(must(hpke.NewKEM(0x647a)).NewPrivateKey(seed))
}

func u32(p []byte) uint32 { return binary.LittleEndian.Uint32(p) }

func (f *formatReader) h(p []byte) []byte {
	if f.encrypted {
		return keyedB(f.hashKey, p)
	}
	return plainB(p)
}

func (f *formatReader) object(name string) []byte {
	return must(os.ReadFile(filepath.Join(f.dir, filepath.FromSlash(name))))
}

// newFormatReader opens dir with a passphrase or the text of a key file.
func newFormatReader(dir, passphrase, keyFile string) *formatReader {
	f := &formatReader{dir: dir}
	doc := f.object("config")
	var c struct {
		Format     string
		Version    int
		ID, Check  string
		Hash       string
		Encryption struct{ Mode string }
	}
	check(json.Unmarshal(doc, &c) == nil && c.Format == "tidemark-repo" && c.Version == 1 && c.Hash == "blake3", "config: %s", doc)
	blank := bytes.Replace(doc, []byte(c.Check), []byte(strings.Repeat("0", 64)), 1)
	check(c.Check == hex.EncodeToString(plainB(blank)), "config: check")
	f.repo = unhex(c.ID)
	switch c.Encryption.Mode {
	case "none":
	case "aes-256-gcm":
		f.encrypted = true
		f.openKeys(passphrase, keyFile)
	default:
		panic(c.Encryption.Mode)
	}
	return f
}

type formatSlot struct {
	ID, Kind, Role, Public, Secret, Ring string
	Argon2id                             struct {
		Salt         string
		Time, Memory uint32
		Threads      uint8
	}
}

func (f *formatReader) openKeys(passphrase, keyFile string) {
	names := must(filepath.Glob(filepath.Join(f.dir, "keys", "*")))
	slices.Sort(names)
	number := filepath.Base(names[len(names)-1])
	line, body, _ := bytes.Cut(f.object("keys/"+number), []byte("\n"))
	words := strings.Split(string(line), " ")
	check(len(words) == 4 && words[0] == "tidemark-keys" && words[1] == "1" && words[2] == hex.EncodeToString(plainB(body)), "keys: %s", line)
	var d struct {
		Anchor, Repository string
		Number             uint64
		Slots              []formatSlot
	}
	check(json.Unmarshal(body, &d) == nil && fmt.Sprintf("%016x", d.Number) == number && d.Repository == hex.EncodeToString(f.repo), "keys: %s", body)

	var secret, anchor []byte
	if keyFile != "" {
		lines := strings.Split(strings.TrimSpace(keyFile), "\n")
		check(lines[0] == "tidemark-key 1", "key file: %s", lines[0])
		for _, l := range lines[1:] {
			switch w := strings.Fields(l); {
			case w[0] == "secret":
				secret = unhex(w[1])
			case w[0] == "trust" && w[1] == d.Repository:
				anchor = unhex(w[2])
			case w[0] == "keys" && w[1] == d.Repository:
				f.takeRing(unbase64(w[2]))
				return
			}
		}
	} else {
		for _, s := range d.Slots {
			if s.Kind != "passphrase" {
				continue
			}
			key := argon2.IDKey([]byte(passphrase), unbase64(s.Argon2id.Salt), s.Argon2id.Time, s.Argon2id.Memory, s.Argon2id.Threads, 32)
			aad := cat(f.repo, s.ID, s.Argon2id.Time, s.Argon2id.Memory, s.Argon2id.Threads, unbase64(s.Public))
			plain := openGCM(key, nil, aad, unbase64(s.Secret))
			secret, anchor = plain[:32], plain[32:64]
		}
	}
	check(hex.EncodeToString(anchor) == d.Anchor, "keys: anchor")
	check(ed25519.Verify(anchor, []byte(strings.Join(words[:3], " ")), unhex(words[3])), "keys: signature")
	private := privateKey(secret)
	i := slices.IndexFunc(d.Slots, func(s formatSlot) bool { return bytes.Equal(unbase64(s.Public), private.PublicKey().Bytes()) })
	s := d.Slots[i]
	f.takeRing(openHPKE(private, "tidemark repository v1 ring", cat(f.repo, d.Number, s.ID, s.Role), unbase64(s.Ring)))
}

func (f *formatReader) takeRing(b []byte) {
	var ring struct {
		Repository, Identity string
		Generations          []struct {
			Number  uint32
			Meta    string
			Private string `json:"content_private"`
		}
	}
	check(json.Unmarshal(b, &ring) == nil && ring.Repository == hex.EncodeToString(f.repo), "ring: %s", b)
	identity := unhex(ring.Identity)
	f.hashKey = deriveD("tidemark repository v1 identity of grains and nodes", identity)
	f.nameTag = deriveD("tidemark repository v1 tag of a name", identity)
	f.nameKey = deriveD("tidemark repository v1 cipher of a name", identity)
	f.gens = map[uint32]formatGeneration{}
	for _, g := range ring.Generations {
		f.gens[g.Number] = formatGeneration{unhex(g.Meta), privateKey(unhex(g.Private))}
	}
}

// points returns the names of all points' objects by VM.
func (f *formatReader) points() map[string][]string {
	out := map[string][]string{}
	for _, p := range must(filepath.Glob(filepath.Join(f.dir, "points", "*", "*"))) {
		folder, base := filepath.Base(filepath.Dir(p)), filepath.Base(p)
		check(regexp.MustCompile(`^\d{8}T\d{6}\.\d{9}Z-[0-9a-f]{16}$`).MatchString(base), "point name %s", base)
		vm := folder
		if f.encrypted {
			b := unhex(folder)
			check(len(b) == 80, "folder %s", folder)
			cipher.NewCTR(must(aes.NewCipher(f.nameKey)), b[:16]).XORKeyStream(b[16:], b[16:])
			check(bytes.Equal(keyedB(f.nameTag, b[16:])[:16], b[:16]), "tag of a name")
			vm = strings.TrimRight(string(b[16:]), "\x00")
		}
		out[vm] = append(out[vm], "points/"+folder+"/"+base)
	}
	return out
}

type formatPoint struct {
	VM    string
	Time  time.Time
	Disks []struct {
		Name     string
		ChangeID string `json:"change_id"`
		Root     struct {
			Ref struct {
				Hash, Pack string
				Ord        uint32
			}
			Level, Grain int
			Size         int64
		}
	}
}

func (f *formatReader) point(name string) (p formatPoint) {
	doc := f.object(name)
	if f.encrypted {
		check(string(doc[:8]) == "TIDEDOCS" && doc[8] == 1, "%s: no sealed document", name)
		plain := openGCM(deriveD("tidemark repository v1 document", f.gens[u32(doc[12:])].meta, doc[16:48]), nil, cat(doc[:48], f.repo, name), doc[48:])
		doc = plain[4 : 4+u32(plain)]
	}
	line, body, _ := bytes.Cut(doc, []byte("\n"))
	h := hex.EncodeToString(f.h(body))
	check(string(line) == "tidemark-point 1 "+h, "%s: %s", name, line)
	check(strings.HasSuffix(name, "-"+h[:16]), "%s: ID", name)
	check(json.Unmarshal(body, &p) == nil, "%s: %s", name, body)
	check(strings.Contains(name, p.Time.UTC().Format("/20060102T150405.000000000Z-")), "%s: time", name)
	return p
}

// record returns record ord of a pack, which must be of the kind and have the hash given.
func (f *formatReader) record(pack []byte, ord uint32, kind byte, hash []byte) []byte {
	id := hex.EncodeToString(pack)
	b := f.object("packs/" + id[:2] + "/" + id)
	header, foot := b[:48], b[len(b)-56:]
	check(string(header[:8]) == "TIDEPACK" && header[8] == 1 && header[9] == kind, "%s: header %x", id, header)
	check(bytes.Equal(header[16:32], pack) && bytes.Equal(header[32:48], f.repo), "%s: header %x", id, header)
	check(string(foot[48:]) == "KCAPEDIT", "%s: footer", id)
	at, n := binary.LittleEndian.Uint64(foot), u32(foot[8:])
	var index, key []byte
	if !f.encrypted {
		index = b[at : at+52*uint64(n)]
		check(int(at)+len(index)+56 == len(b), "%s: length", id)
		check(bytes.Equal(plainB(cat(header, index, foot[:16])), foot[16:48]), "%s: hash", id)
	} else {
		check(header[10] == 1 && int(at)+int(n)+56 == len(b), "%s: sealed pack", id)
		g := f.gens[u32(header[12:])]
		var capsule []byte
		if kind == 1 {
			capsule = b[48 : 48+1168]
			key = openHPKE(g.private, "tidemark repository v1 data pack", header, capsule)
		} else {
			key = deriveD("tidemark repository v1 node pack", g.meta, pack)
		}
		plain := openGCM(deriveD("tidemark repository v1 pack index", g.meta, foot[16:48]), nil, cat(header, capsule, foot[:16]), b[at:at+uint64(n)])
		index = plain[4 : 4+52*u32(plain)]
	}
	e := index[52*ord : 52*ord+52]
	off, stored, raw, codec := u32(e), u32(e[4:]), u32(e[8:]), e[16]
	p := b[off : off+stored]
	check(crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)) == u32(e[12:]), "%s %d: CRC", id, ord)
	check(bytes.Equal(e[20:52], hash), "%s %d: identity", id, ord)
	check(codec>>4 == 0 != f.encrypted, "%s %d: codec %x", id, ord, codec)
	if codec>>4 == 1 {
		p = openGCM(key, cat(ord, make([]byte, 8)), cat(header, raw, codec), p)
	}
	if codec&15 == 1 {
		p = must(must(zstd.NewReader(nil)).DecodeAll(p, nil))
	}
	check(len(p) == int(raw) && bytes.Equal(f.h(p), hash), "%s %d: content", id, ord)
	return p
}

// fill reads what is below a node into the disk.
func (f *formatReader) fill(disk []byte, hash, pack []byte, ord uint32, level, grain int, first int64) {
	p := f.record(pack, ord, 2, hash)
	check(string(p[:4]) == "TMN\x01" && int(p[4]) == level, "node %x", p[:16])
	packs := p[16:]
	child := packs[16*int(p[5]):]
	for i := range int64(64) {
		if binary.LittleEndian.Uint64(p[8:])>>i&1 == 0 {
			continue
		}
		hash, at, ord := child[:32], 16*int(child[32]), u32(child[33:])
		child = child[37:]
		n := first + i<<(6*level)
		if level > 0 {
			f.fill(disk, hash, packs[at:at+16], ord, level-1, grain, n)
		} else {
			copy(disk[n*int64(grain):], f.record(packs[at:at+16], ord, 1, hash))
		}
	}
}

func (f *formatReader) disks(p formatPoint) map[string][]byte {
	out := map[string][]byte{}
	for _, d := range p.Disks {
		disk := make([]byte, d.Root.Size)
		if r := d.Root; r.Ref.Hash != "" {
			f.fill(disk, unhex(r.Ref.Hash), unhex(r.Ref.Pack), r.Ref.Ord, r.Level, r.Grain, 0)
		}
		out[d.Name] = disk
	}
	return out
}

// TestFormatDocumentIsEnoughToRead makes repositories with the store and reads them with the reader above.
func TestFormatDocumentIsEnoughToRead(t *testing.T) {
	t.Parallel()
	const passphrase = "open sesame"
	for _, how := range []string{"plain", "passphrase", "key file", "exported"} {
		t.Run(how, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "repo")
			var opts []store.Option
			var opening string
			if how != "plain" {
				opts = append(opts, store.Encrypt(store.NewKey{Role: store.FullKey, Passphrase: store.Passphrase(passphrase)}))
			}
			r, err := store.Init(t.Context(), dir, opts...)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = r.Close() }()
			want := map[string][]byte{} // by VM and change ID
			makePoints := func(n int) {
				for range n {
					for _, vm := range []string{"web-1", "db.example"} {
						id := fmt.Sprintf("%s %d", vm, len(want))
						want[id] = writePoint(t, r, vm, want)
					}
				}
			}
			makePoints(2)
			if how != "plain" { // a second generation of keys
				if _, err := r.RotateKeys(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			makePoints(1)
			switch how {
			case "key file":
				k := must(store.NewKeyFile())
				if _, _, err := r.AddKey(t.Context(), store.NewKey{Role: store.FullKey, Public: must(store.ParsePublicKey(k.Public()))}); err != nil {
					t.Fatal(err)
				}
				if err := r.Trust(k); err != nil {
					t.Fatal(err)
				}
				opening = string(must(k.Encode()))
			case "exported":
				opening = string(must(must(r.ExportKeys(t.Context())).Encode()))
			}
			f := newFormatReader(dir, passphrase, opening)
			got := 0
			for vm, names := range f.points() {
				slices.Sort(names)
				for _, name := range names {
					p := f.point(name)
					check(p.VM == vm, "%s: VM %q", name, p.VM)
					disk, ok := want[p.Disks[0].ChangeID]
					if !ok || !bytes.Equal(f.disks(p)["disk0"], disk) {
						t.Errorf("%s of %s: differs from what was written (known: %v)", name, vm, ok)
					}
					got++
				}
			}
			if got != len(want) || got != 6 {
				t.Errorf("%d points read, %d written", got, len(want))
			}
		})
	}
}

// writePoint makes a point with a random change and returns the disk.
func writePoint(t *testing.T, r *store.Repo, vm string, done map[string][]byte) []byte {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	w := must(r.Begin(ctx, vm))
	defer func() { _ = w.Abort() }()
	const size, grain = 5<<20 + 100, 4096
	disk := make([]byte, size)
	if w.Parent() != nil {
		copy(disk, done[w.Parent().Disks[0].ChangeID])
	}
	d := must(w.Disk(ctx, store.DiskOptions{Name: "disk0", Size: size, Grain: grain}))
	rnd := rand.New(rand.NewPCG(uint64(len(done)), 1))
	for i := range 40 {
		off := rnd.IntN(size/grain) * grain
		p := disk[off : off+grain]
		for k := range p {
			p[k] = byte(rnd.IntN(256)) >> (i % 3 * 4 & 7) // some compresses
		}
		if err := d.Write(ctx, int64(off), p); err != nil {
			t.Fatal(err)
		}
	}
	copy(disk[size-100:], "the tail of the disk")
	if err := d.Write(ctx, size-100, disk[size-100:]); err != nil {
		t.Fatal(err)
	}
	p := store.Point{Consistency: store.Crash, Disks: []store.Disk{{Name: "disk0", ChangeID: fmt.Sprintf("%s %d", vm, len(done))}}}
	if _, err := w.Commit(ctx, p); err != nil {
		t.Fatal(err)
	}
	return disk
}
