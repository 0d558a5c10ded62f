package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hpke"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/argon2"

	"github.com/tidemark/tidemark/store/blob"
)

// Key is what a person or host holds to open an encrypted repository: a [Passphrase] or
// a [KeyFile].
type Key interface {
	// ring opens the repository's keys.
	ring(ctx context.Context, b blob.Store, repo [16]byte) (*ring, uint64, *opener, error)
}

// Passphrase is a key that a person remembers. It is not kept after opening.
type Passphrase []byte

// argon2Params are the costs of a passphrase (RFC 9106).
type argon2Params struct {
	Salt    []byte `json:"salt"`    // 32 bytes
	Time    uint32 `json:"time"`    // passes
	Memory  uint32 `json:"memory"`  // KiB
	Threads uint8  `json:"threads"` // lanes
}

// argon2Cost is what RFC 9106, section 4 recommends where memory is short: a backup runs beside virtual
// machines. A variable so that tests need not pay for it.
var argon2Cost = argon2Params{Time: 3, Memory: 64 << 10, Threads: 4}

// Limits of what a document can ask for: the costs are paid before anything of it can be
// checked.
const (
	maxArgon2Time   = 16
	maxArgon2Memory = 2 << 20 // KiB: RFC 9106's first choice
	maxArgon2Lanes  = 16
)

func (a *argon2Params) check() error {
	if len(a.Salt) != 32 || a.Time < 1 || a.Time > maxArgon2Time || a.Threads < 1 || a.Threads > maxArgon2Lanes ||
		a.Memory < 8*uint32(a.Threads) || a.Memory > maxArgon2Memory {
		return errors.New("costs of the passphrase out of bounds")
	}
	return nil
}

func (a *argon2Params) key(p Passphrase) onceKey {
	return onceKey(argon2.IDKey(p, a.Salt, a.Time, a.Memory, a.Threads, 32))
}

// secretAAD binds what a passphrase opens to the slot and its costs.
func (s *slot) secretAAD(repo [16]byte) []byte {
	b := append(repo[:], s.ID...)
	b = binary.LittleEndian.AppendUint32(b, s.Argon2.Time)
	b = binary.LittleEndian.AppendUint32(b, s.Argon2.Memory)
	return append(append(b, s.Argon2.Threads), s.Public...)
}

// newSlot makes a slot whose private key the passphrase opens.
func (p Passphrase) newSlot(role Role, repo [16]byte, anchor key32) (slot, *opener, error) {
	if len(p) == 0 {
		return slot{}, nil, fmt.Errorf("%w: an empty passphrase", ErrInvalid)
	}
	private, seed, err := newPrivateKey()
	if err != nil {
		return slot{}, nil, err
	}
	s := fileSlot(role, private.PublicKey())
	salt := randomKey()
	cost := argon2Cost
	cost.Salt = salt[:]
	s.Kind, s.Argon2 = slotPassphrase, &cost
	s.Secret = cost.key(p).seal(nil, slices.Concat(seed[:], anchor[:]), s.secretAAD(repo))
	return s, &opener{private, anchor}, nil
}

// open tries p on a slot.
func (p Passphrase) open(s *slot, repo [16]byte) (*opener, bool) {
	plain, err := s.Argon2.key(p).open(nil, s.Secret, s.secretAAD(repo))
	if err != nil || len(plain) != 64 {
		return nil, false
	}
	private, err := kem().NewPrivateKey(plain[:32])
	if err != nil {
		return nil, false
	}
	return &opener{private, key32(plain[32:])}, true
}

func (p Passphrase) ring(ctx context.Context, b blob.Store, repo [16]byte) (*ring, uint64, *opener, error) {
	for move := 0; ; move++ {
		docs, err := listKeyDocs(ctx, b)
		if err != nil {
			return nil, 0, nil, err
		}
		o, gone, err := p.find(ctx, b, docs, repo)
		if err == nil {
			return o.ring(ctx, b, docs, repo)
		}
		if !gone || move == maxMoves { // else keys were changed between the listing and now
			return nil, 0, nil, err
		}
	}
}

// find looks for a slot that p opens. It also tells whether a document that was listed is gone.
func (p Passphrase) find(ctx context.Context, b blob.Store, docs []listedDoc, repo [16]byte) (_ *opener, gone bool, _ error) {
	var damage error
	for _, l := range docs[:min(len(docs), maxKeyDocs)] {
		d, err := readKeyDoc(ctx, b, l, repo)
		switch {
		case errors.Is(err, ErrCorrupt):
			damage = err
			continue
		case errors.Is(err, ErrNotFound):
			gone = true
			continue
		case err != nil:
			return nil, gone, err
		}
		for i := range d.Slots {
			if d.Slots[i].Kind != slotPassphrase {
				continue
			}
			if err := ctx.Err(); err != nil {
				return nil, gone, err
			}
			if o, ok := p.open(&d.Slots[i], repo); ok {
				return o, gone, nil
			}
		}
	}
	if damage != nil {
		return nil, gone, damage
	}
	if len(docs) == 0 {
		_, gone, err := (&opener{}).newestOf(ctx, b, nil, repo)
		return nil, gone, err
	}
	return nil, gone, fmt.Errorf("%w: wrong passphrase", ErrKey)
}

func (o *opener) ring(ctx context.Context, b blob.Store, docs []listedDoc, repo [16]byte) (*ring, uint64, *opener, error) {
	d, err := o.newest(ctx, b, docs, repo)
	if err != nil {
		return nil, 0, nil, err
	}
	g, err := o.open(d, repo)
	if err != nil {
		return nil, 0, nil, err
	}
	return g, d.Number, o, nil
}

// KeyFile is a key that a host keeps in a file. It says which repositories it trusts: by whom
// their keys must be signed, so that nobody can put other keys in the place of theirs.
type KeyFile struct {
	private hpke.PrivateKey    // nil: only exported keys
	seed    key32              // of private
	trust   map[[16]byte]key32 // anchors by repository
	rings   map[[16]byte]*ring // exported keys by repository
}

// The first lines of the files.
const (
	keyFileMagic   = "tidemark-key 1"
	publicKeyMagic = "tidemark-public-key 1"
	maxKeyFileLen  = 1 << 20
)

// NewKeyFile makes a key that no repository knows yet.
func NewKeyFile() (*KeyFile, error) {
	private, seed, err := newPrivateKey()
	if err != nil {
		return nil, err
	}
	return &KeyFile{private: private, seed: seed, trust: map[[16]byte]key32{}, rings: map[[16]byte]*ring{}}, nil
}

func newPrivateKey() (hpke.PrivateKey, key32, error) {
	private, err := kem().GenerateKey()
	if err != nil {
		return nil, key32{}, fmt.Errorf("make a key: %w", err)
	}
	b, err := private.Bytes()
	if err != nil {
		return nil, key32{}, fmt.Errorf("make a key: %w", err)
	}
	return private, key32(b), nil
}

// Encode returns the text of the file. It is secret.
func (k *KeyFile) Encode() ([]byte, error) {
	b := []byte(keyFileMagic + "\n")
	if k.private != nil {
		b = fmt.Appendf(b, "secret %x\n", k.seed)
	}
	for _, repo := range sortedRepos(k.trust) {
		b = append(b, TrustLine(repo, k.trust[repo])+"\n"...)
	}
	for _, repo := range sortedRepos(k.rings) {
		p, err := json.Marshal(k.rings[repo])
		if err != nil {
			return nil, fmt.Errorf("encode keys: %w", err)
		}
		b = fmt.Appendf(b, "keys %x %s\n", repo, base64.StdEncoding.EncodeToString(p))
	}
	return b, nil
}

// TrustLine is the line of a key file that says by whom the keys of a repository must be signed.
// It is no secret.
func TrustLine(repo [16]byte, anchor [32]byte) string {
	return fmt.Sprintf("trust %x %x", repo, anchor)
}

func sortedRepos[V any](m map[[16]byte]V) [][16]byte {
	ids := make([][16]byte, 0, len(m))
	for id := range m {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b [16]byte) int { return bytes.Compare(a[:], b[:]) })
	return ids
}

// ParseKeyFile reads what Encode wrote. Empty lines and such that begin with # are left out.
// The error wraps ErrInvalid.
func ParseKeyFile(b []byte) (*KeyFile, error) {
	k := &KeyFile{trust: map[[16]byte]key32{}, rings: map[[16]byte]*ring{}}
	err := eachLine(b, keyFileMagic, func(kind string, parts []string) error {
		switch {
		case kind == "secret" && len(parts) == 1 && k.private == nil:
			if err := k.seed.UnmarshalText([]byte(parts[0])); err != nil {
				return err
			}
			var err error
			k.private, err = kem().NewPrivateKey(k.seed[:])
			return err
		case (kind == "trust" || kind == "keys") && len(parts) == 2:
			var repo [16]byte
			if err := decodeHex(repo[:], []byte(parts[0])); err != nil {
				return err
			}
			if kind == "trust" {
				var anchor key32
				err := anchor.UnmarshalText([]byte(parts[1]))
				if old, ok := k.trust[repo]; ok && old != anchor {
					return errors.New("two anchors for one repository")
				}
				k.trust[repo] = anchor
				return err
			}
			p, err := base64.StdEncoding.DecodeString(parts[1])
			if err != nil {
				return err
			}
			k.rings[repo], err = decodeRing(p, repo)
			return err
		}
		return errors.New("not understood")
	})
	if err != nil {
		return nil, fmt.Errorf("%w: key file: %w", ErrInvalid, err)
	}
	if k.private == nil && len(k.rings) == 0 {
		return nil, fmt.Errorf("%w: key file: it has no secret", ErrInvalid)
	}
	return k, nil
}

// eachLine calls f for the words of each line below the first. The error names the line, and
// nothing of what is in it.
func eachLine(b []byte, magic string, f func(kind string, parts []string) error) error {
	if len(b) > maxKeyFileLen {
		return fmt.Errorf("longer than %d bytes", maxKeyFileLen)
	}
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, maxKeyFileLen+1)
	for n := 1; lines.Scan(); n++ {
		switch line := strings.TrimSpace(lines.Text()); {
		case n == 1 && line != magic:
			return fmt.Errorf("its first line is not %q", magic)
		case n == 1 || line == "" || strings.HasPrefix(line, "#"):
		default:
			words := strings.Fields(line)
			if err := f(words[0], words[1:]); err != nil {
				return fmt.Errorf("line %d: %w", n, err)
			}
		}
	}
	if len(b) == 0 {
		return errors.New("it is empty")
	}
	return lines.Err()
}

// Public returns the text of the file that whoever adds the key to a repository needs, or nil if
// k is an exported key. It is no secret.
func (k *KeyFile) Public() []byte {
	if k.private == nil {
		return nil
	}
	return PublicKey(k.private.PublicKey().Bytes()).encode()
}

// PublicKey is the public half of a [KeyFile].
type PublicKey []byte

func (p PublicKey) encode() []byte {
	return fmt.Appendf(nil, "%s\nkey %s\n", publicKeyMagic, base64.StdEncoding.EncodeToString(p))
}

// ParsePublicKey reads what [KeyFile.Public] gave. The error wraps ErrInvalid.
func ParsePublicKey(b []byte) (p PublicKey, err error) {
	err = eachLine(b, publicKeyMagic, func(kind string, parts []string) (err error) {
		if kind != "key" || len(parts) != 1 || p != nil {
			return errors.New("not understood")
		}
		if p, err = base64.StdEncoding.DecodeString(parts[0]); err != nil {
			return err
		}
		_, err = kem().NewPublicKey(p)
		return err
	})
	if err == nil && p == nil {
		err = errors.New("it has no key")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", ErrInvalid, err)
	}
	return p, nil
}

// fileSlot is a slot of a key whose private half is not here.
func fileSlot(role Role, public hpke.PublicKey) slot {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	return slot{ID: hex.EncodeToString(id[:]), Kind: slotFile, Role: role, Public: public.Bytes()}
}

func (k *KeyFile) ring(ctx context.Context, b blob.Store, repo [16]byte) (*ring, uint64, *opener, error) {
	anchor, ok := k.trust[repo]
	if k.private != nil && ok {
		docs, err := listKeyDocs(ctx, b)
		if err != nil {
			return nil, 0, nil, err
		}
		g, n, o, err := (&opener{k.private, anchor}).ring(ctx, b, docs, repo)
		if err == nil || k.rings[repo] == nil || !errors.Is(err, ErrCorrupt) {
			return g, n, o, err
		}
	}
	if g := k.rings[repo]; g != nil {
		return g, 0, nil, nil
	}
	if ok {
		return nil, 0, nil, fmt.Errorf("%w: the key file has no secret for this repository", ErrKey)
	}
	return nil, 0, nil, fmt.Errorf("%w: the key file does not trust repository %x: add to it the trust line that \"tidemark repo key add\" printed", ErrKey, repo)
}
