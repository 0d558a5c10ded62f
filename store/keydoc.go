package store

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/hpke"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

const (
	keyPrefix     = "keys/"
	keyDocMagic   = "tidemark-keys "
	keyDocVersion = 1
	maxKeyDocLen  = 1 << 20
	maxSlots      = 64
	maxKeyDocs    = 16 // more than one is left by what could not be deleted

	ringInfo = "tidemark repository v1 ring"
)

// keyDoc is the document keys/<number>: everybody who can open the repository. Signed by
// the repository's own key, which holders of full keys have.
type keyDoc struct {
	Version    int       `json:"version"`
	Number     uint64    `json:"number"`
	Repository string    `json:"repository"` // 32 hex digits
	Created    time.Time `json:"created"`
	Generation uint32    `json:"generation"` // the newest of the rings
	Anchor     key32     `json:"anchor"`     // Ed25519 public key of the signature
	Slots      []slot    `json:"slots"`
}

// slot is one key that opens the repository.
type slot struct {
	ID      string        `json:"id"`   // 16 hex digits
	Kind    string        `json:"kind"` // "passphrase" or "file"
	Role    Role          `json:"role"`
	Created time.Time     `json:"created"`
	Public  []byte        `json:"public"` // HPKE public key
	Argon2  *argon2Params `json:"argon2id,omitempty"`
	// Secret is, for a passphrase, what it opens: the slot's private key and the anchor.
	Secret []byte `json:"secret,omitempty"`
	// Ring is the ring sealed to Public, with the names and private keys of content left
	// out if the slot is a writer's.
	Ring []byte `json:"ring"`
}

// Role says what a key is good for.
type Role string

// Roles of keys.
const (
	// FullKey reads, writes and changes the keys.
	FullKey Role = "full"
	// WriterKey makes points. It reads maps, points and names, and no content.
	WriterKey Role = "writer"
)

const (
	slotPassphrase = "passphrase"
	slotFile       = "file"
)

// ring is all keys of a repository, as a slot opens them.
type ring struct {
	Repository  string           `json:"repository"`
	Identity    key32            `json:"identity"`
	Generations []ringGeneration `json:"generations"` // ascending
	// What follows, and the private keys above, holders of full keys have.
	Signing *key32            `json:"signing,omitempty"` // seed of the Ed25519 key
	Names   map[string]string `json:"names,omitempty"`   // what people call the keys, by slot ID
}

type ringGeneration struct {
	Number         uint32    `json:"number"`
	Created        time.Time `json:"created"`
	Meta           key32     `json:"meta"`
	ContentPublic  []byte    `json:"content_public"`
	ContentPrivate *key32    `json:"content_private,omitempty"`
}

// key32 is 32 bytes, as 64 hex digits in JSON.
type key32 [32]byte

func (k key32) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, k[:]), nil }

func (k *key32) UnmarshalText(p []byte) error { return decodeHex(k[:], p) }

func newGeneration(number uint32) (ringGeneration, error) {
	private, err := kem().GenerateKey()
	if err != nil {
		return ringGeneration{}, fmt.Errorf("make a content key: %w", err)
	}
	b, err := private.Bytes()
	if err != nil {
		return ringGeneration{}, fmt.Errorf("make a content key: %w", err)
	}
	seed := key32(b)
	return ringGeneration{
		Number: number, Created: time.Now().UTC().Truncate(time.Second), Meta: randomKey(),
		ContentPublic: private.PublicKey().Bytes(), ContentPrivate: &seed,
	}, nil
}

// newRing makes the keys of a new repository.
func newRing(repo [16]byte) (*ring, error) {
	g, err := newGeneration(1)
	if err != nil {
		return nil, err
	}
	seed := key32(randomKey())
	return &ring{
		Repository: hex.EncodeToString(repo[:]), Identity: randomKey(),
		Generations: []ringGeneration{g}, Signing: &seed, Names: map[string]string{},
	}, nil
}

// forRole returns what a slot of that role is given.
func (g *ring) forRole(r Role) *ring {
	if r == FullKey {
		return g
	}
	w := &ring{Repository: g.Repository, Identity: g.Identity, Generations: slices.Clone(g.Generations)}
	for i := range w.Generations {
		w.Generations[i].ContentPrivate = nil
	}
	return w
}

func (g *ring) signer() ed25519.PrivateKey { return ed25519.NewKeyFromSeed(g.Signing[:]) }

func (g *ring) anchor() key32 { return key32(g.signer().Public().(ed25519.PublicKey)) }

func decodeRing(b []byte, repo [16]byte) (*ring, error) {
	g := &ring{}
	if err := json.Unmarshal(b, g); err != nil {
		return nil, err
	}
	if g.Repository != hex.EncodeToString(repo[:]) {
		return nil, errors.New("the keys are those of another repository")
	}
	for i := range g.Generations {
		if (g.Generations[i].ContentPrivate == nil) != (g.Signing == nil) {
			return nil, errors.New("neither a full ring nor a writer's")
		}
	}
	if g.Names == nil && g.Signing != nil {
		g.Names = map[string]string{}
	}
	return g, nil
}

// seal puts the ring into s.
func (s *slot) seal(g *ring, d *keyDoc, repo [16]byte) error {
	public, err := kem().NewPublicKey(s.Public)
	if err != nil {
		return fmt.Errorf("public key of %s: %w", s.ID, err)
	}
	plain, err := json.Marshal(g.forRole(s.Role))
	if err != nil {
		return fmt.Errorf("encode keys: %w", err)
	}
	enc, to, err := hpke.NewSender(public, kdf(), aead(), []byte(ringInfo))
	if err != nil {
		return fmt.Errorf("seal keys to %s: %w", s.ID, err)
	}
	sealed, err := to.Seal(s.aad(d.Number, repo), plain)
	if err != nil {
		return fmt.Errorf("seal keys to %s: %w", s.ID, err)
	}
	s.Ring = slices.Concat(enc, sealed)
	return nil
}

func (s *slot) aad(number uint64, repo [16]byte) []byte {
	b := binary.LittleEndian.AppendUint64(repo[:], number)
	return append(append(b, s.ID...), s.Role...)
}

// open returns the ring in s.
func (s *slot) open(private hpke.PrivateKey, number uint64, repo [16]byte) (*ring, error) {
	if len(s.Ring) < encapLen {
		return nil, errors.New("too short")
	}
	from, err := hpke.NewRecipient(s.Ring[:encapLen], private, kdf(), aead(), []byte(ringInfo))
	if err != nil {
		return nil, err
	}
	plain, err := from.Open(s.aad(number, repo), s.Ring[encapLen:])
	if err != nil {
		return nil, err
	}
	return decodeRing(plain, repo)
}

func keyDocName(number uint64) string { return fmt.Sprintf("%s%016x", keyPrefix, number) }

// encode signs d: a line with the hash of the body and the signature of what is before
// it, and the body.
func (d *keyDoc) encode(by ed25519.PrivateKey) ([]byte, error) {
	body, err := json.MarshalIndent(d, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encode keys: %w", err)
	}
	body = append(body, '\n')
	head := fmt.Sprintf("%s%d %s", keyDocMagic, keyDocVersion, plainHasher.sum(body))
	doc := fmt.Appendf(nil, "%s %x\n", head, ed25519.Sign(by, []byte(head)))
	if len(doc)+len(body) > maxKeyDocLen {
		return nil, fmt.Errorf("%w: the keys document would be longer than %d bytes", ErrInvalid, maxKeyDocLen)
	}
	return append(doc, body...), nil
}

// signedDoc is a keys document whose signature was not checked yet: for that, one has
// to know by whom it has to be.
type signedDoc struct {
	keyDoc
	head      string
	signature []byte
}

func (d *signedDoc) signedBy(anchor key32) bool {
	return d.Anchor == anchor && ed25519.Verify(anchor[:], []byte(d.head), d.signature)
}

// decodeKeyDoc reads the object keys/<number>.
func decodeKeyDoc(b []byte, number uint64, repo [16]byte) (*signedDoc, error) {
	name := keyDocName(number)
	corrupt := func(what string) error { return &CorruptError{name, what} }
	line, body, ok := bytes.Cut(b, []byte("\n"))
	at := bytes.LastIndexByte(line, ' ')
	if !ok || at < 0 || !bytes.HasPrefix(line, []byte(keyDocMagic)) {
		return nil, corrupt("not the document of keys")
	}
	d := &signedDoc{head: string(line[:at])}
	var err error
	if d.signature, err = hex.DecodeString(string(line[at+1:])); err != nil || len(d.signature) != ed25519.SignatureSize || string(line[at+1:]) != hex.EncodeToString(d.signature) {
		return nil, corrupt("bad signature")
	}
	version, hash, _ := strings.Cut(strings.TrimPrefix(d.head, keyDocMagic), " ")
	if hash != plainHasher.sum(body).String() {
		return nil, corrupt("the document does not match its hash")
	}
	err = json.Unmarshal(body, &d.keyDoc)
	if d.Version > keyDocVersion && version == strconv.Itoa(d.Version) {
		return nil, fmt.Errorf("%s: %w: keys version %d", name, ErrVersion, d.Version)
	}
	if d.Version != keyDocVersion || version != strconv.Itoa(keyDocVersion) {
		return nil, corrupt("bad first line")
	}
	if err != nil {
		return nil, corrupt(err.Error())
	}
	if d.Number != number || d.Repository != hex.EncodeToString(repo[:]) {
		return nil, corrupt("it is the keys document of another number or repository")
	}
	if err := d.check(); err != nil {
		return nil, corrupt(err.Error())
	}
	return d, nil
}

func (d *keyDoc) check() error {
	if len(d.Slots) == 0 || len(d.Slots) > maxSlots {
		return fmt.Errorf("%d keys", len(d.Slots))
	}
	seen := map[string]bool{}
	for i := range d.Slots {
		s := &d.Slots[i]
		if len(s.ID) != 16 || !isHex(s.ID) || seen[s.ID] {
			return fmt.Errorf("bad key ID %q", s.ID)
		}
		seen[s.ID] = true
		if s.Role != FullKey && s.Role != WriterKey {
			return fmt.Errorf("key %s: unknown role %q", s.ID, s.Role)
		}
		switch s.Kind {
		case slotFile:
			if s.Argon2 != nil || s.Secret != nil {
				return fmt.Errorf("key %s: a passphrase's parts in a key file's place", s.ID)
			}
		case slotPassphrase:
			if s.Argon2 == nil {
				return fmt.Errorf("key %s: without parameters of its passphrase", s.ID)
			}
			if err := s.Argon2.check(); err != nil {
				return fmt.Errorf("key %s: %w", s.ID, err)
			}
		default:
			return fmt.Errorf("key %s: unknown kind %q", s.ID, s.Kind)
		}
	}
	return nil
}

// listedDoc is an object below keys/.
type listedDoc struct {
	number uint64
	name   string
}

// listKeyDocs returns the keys documents, newest first.
func listKeyDocs(ctx context.Context, b blob.Store) (docs []listedDoc, err error) {
	for info, err := range b.List(ctx, keyPrefix) {
		if err != nil {
			return nil, err
		}
		n, err := strconv.ParseUint(strings.TrimPrefix(info.Name, keyPrefix), 16, 64)
		if err == nil && n > 0 && keyDocName(n) == info.Name {
			docs = append(docs, listedDoc{n, info.Name})
		}
	}
	slices.Reverse(docs)
	return docs, nil
}

func readKeyDoc(ctx context.Context, b blob.Store, l listedDoc, repo [16]byte) (*signedDoc, error) {
	p, err := readSmall(ctx, b, l.name, maxKeyDocLen)
	if err != nil {
		return nil, err
	}
	return decodeKeyDoc(p, l.number, repo)
}

// opener is what a person's key comes to: the private key of a slot, and by whom the
// documents must be signed.
type opener struct {
	private hpke.PrivateKey
	anchor  key32
}

// newest returns the newest document that the repository has signed. Others are passed
// over: whoever can put objects could make them. The error wraps ErrNotFound if there is none.
func (o *opener) newest(ctx context.Context, b blob.Store, docs []listedDoc, repo [16]byte) (*signedDoc, error) {
	for move := 0; ; move++ {
		d, gone, err := o.newestOf(ctx, b, docs, repo)
		if err == nil || !gone || move == maxMoves {
			return d, err
		}
		// Keys were changed between the listing and now.
		if docs, err = listKeyDocs(ctx, b); err != nil {
			return nil, err
		}
	}
}

// newestOf also tells whether a document that was listed is gone.
func (o *opener) newestOf(ctx context.Context, b blob.Store, docs []listedDoc, repo [16]byte) (_ *signedDoc, gone bool, _ error) {
	var first error
	for _, l := range docs[:min(len(docs), maxKeyDocs)] {
		d, err := readKeyDoc(ctx, b, l, repo)
		switch {
		case err == nil && d.signedBy(o.anchor):
			return d, gone, nil
		case err == nil:
			err = &CorruptError{l.name, "it is not signed by this repository's key"}
		case errors.Is(err, ErrNotFound):
			gone = true
			continue
		case !errors.Is(err, ErrCorrupt):
			return nil, gone, err
		}
		if first == nil {
			first = err
		}
	}
	if first == nil {
		first = &CorruptError{keyPrefix, "the repository is encrypted and has no document of keys any more; an exported key file opens it"}
	}
	return nil, gone, first
}

// open returns the ring that d holds for o.
func (o *opener) open(d *signedDoc, repo [16]byte) (*ring, error) {
	public := o.private.PublicKey().Bytes()
	i := slices.IndexFunc(d.Slots, func(s slot) bool { return bytes.Equal(s.Public, public) })
	if i < 0 {
		return nil, fmt.Errorf("%w: the repository does not know this key: it was removed, or never added (see \"tidemark repo key list\" with another key)", ErrKey)
	}
	g, err := d.Slots[i].open(o.private, d.Number, repo)
	if err != nil {
		return nil, &CorruptError{keyDocName(d.Number), fmt.Sprintf("key %s: %v", d.Slots[i].ID, err)}
	}
	return g, nil
}
