package store

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hpke"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"lukechampine.com/blake3"

	"github.com/tidemark/tidemark/store/blob"
)

// ErrKey is wrapped when a repository can't be opened, or an object of it read, for want
// of a fitting key: none was given, a wrong passphrase, a key that was removed.
var ErrKey = errors.New("no fitting key")

// ErrNotEncrypted is wrapped when a repository that must be encrypted says that it is not.
var ErrNotEncrypted = errors.New("the repository says that it is not encrypted")

// ErrWriterKey is wrapped when content is asked for with a key that can write and not read.
var ErrWriterKey = errors.New("a writer's key, which can't read content")

// Contexts of key derivation (BLAKE3 derive_key), see docs/format.md.
const (
	deriveIdentity = "tidemark repository v1 identity of grains and nodes"
	deriveNameTag  = "tidemark repository v1 tag of a name"
	deriveName     = "tidemark repository v1 cipher of a name"
	deriveDocument = "tidemark repository v1 document"
	deriveIndex    = "tidemark repository v1 pack index"
	deriveNodePack = "tidemark repository v1 node pack"
)

// sealLen is what sealing adds to a record, in bytes.
const sealLen = 16

// suite is the one choice of algorithms of HPKE (RFC 9180): the hybrid of ML-KEM-768
// and X25519, because backups are kept for longer than it may take to break the latter.
func kem() hpke.KEM   { return hpke.MLKEM768X25519() }
func kdf() hpke.KDF   { return hpke.HKDFSHA256() }
func aead() hpke.AEAD { return hpke.AES256GCM() }

// Lengths of HPKE's parts in this suite, in bytes.
const (
	encapLen   = 1120
	capsuleLen = encapLen + 32 + sealLen // of a pack's key
)

// keyring holds the keys of an open encrypted repository. Safe for concurrent use.
type keyring struct {
	repo     [16]byte
	ids      *hasher
	nameTag  *hasher
	nameKey  [32]byte
	opener   *opener // to look whether keys were added; nil where the ring came from an exported file
	state    atomic.Pointer[ringState]
	reloaded sync.Mutex
}

// ringState is what changes when keys are added or removed. Immutable.
type ringState struct {
	ring   *ring
	number uint64 // of the keys document; 0: from an exported file
	byNum  map[uint32]*keySet
	newest *keySet
}

// keySet is the keys for what is written between two rotations: one generation of them.
type keySet struct {
	number  uint32
	meta    [32]byte
	public  hpke.PublicKey
	private hpke.PrivateKey // nil with a writer's key
}

func newKeyring(repo [16]byte, g *ring, number uint64, o *opener) (*keyring, error) {
	s, err := newRingState(g, number)
	if err != nil {
		return nil, err
	}
	k := &keyring{repo: repo, opener: o}
	k.ids = newHasher(derive(deriveIdentity, g.Identity[:]))
	k.nameTag = newHasher(derive(deriveNameTag, g.Identity[:]))
	k.nameKey = derive(deriveName, g.Identity[:])
	k.state.Store(s)
	return k, nil
}

func newRingState(g *ring, number uint64) (*ringState, error) {
	s := &ringState{ring: g, number: number, byNum: map[uint32]*keySet{}}
	for i := range g.Generations {
		rg := &g.Generations[i]
		public, err := kem().NewPublicKey(rg.ContentPublic)
		if err != nil {
			return nil, fmt.Errorf("content key of generation %d: %w", rg.Number, err)
		}
		n := &keySet{number: rg.Number, meta: rg.Meta, public: public}
		if rg.ContentPrivate != nil {
			if n.private, err = kem().NewPrivateKey(rg.ContentPrivate[:]); err != nil {
				return nil, fmt.Errorf("content key of generation %d: %w", rg.Number, err)
			}
			if subtle.ConstantTimeCompare(n.private.PublicKey().Bytes(), rg.ContentPublic) != 1 {
				return nil, fmt.Errorf("content key of generation %d: its halves do not fit", rg.Number)
			}
		}
		if s.byNum[n.number] != nil || s.newest != nil && n.number <= s.newest.number {
			return nil, fmt.Errorf("generation %d of the keys is out of order", n.number)
		}
		s.byNum[n.number], s.newest = n, n
	}
	if s.newest == nil {
		return nil, errors.New("without a generation of keys")
	}
	return s, nil
}

func (k *keyring) newest() *keySet { return k.state.Load().newest }

// full tells whether content can be read.
func (k *keyring) full() bool { return k.newest().private != nil }

// set returns the keys of generation n. If they are not known it looks whether
// keys were rotated since the repository was opened. An error without a cause in the
// backend is for the caller to name the object: nil, nil says that there is no such generation.
func (k *keyring) set(ctx context.Context, b blob.Store, n uint32) (*keySet, error) {
	if g := k.state.Load().byNum[n]; g != nil {
		return g, nil
	}
	if err := k.refresh(ctx, b); err != nil {
		return nil, err
	}
	return k.state.Load().byNum[n], nil
}

// refresh takes over what was changed in the repository's keys. The error wraps ErrKey if
// this key was removed.
func (k *keyring) refresh(ctx context.Context, b blob.Store) error {
	if k == nil || k.opener == nil {
		return nil
	}
	k.reloaded.Lock()
	defer k.reloaded.Unlock()
	docs, err := listKeyDocs(ctx, b)
	if err != nil {
		return err
	}
	now := k.state.Load()
	if len(docs) > 0 && docs[0].number == now.number {
		return nil
	}
	d, err := k.opener.newest(ctx, b, docs, k.repo)
	if err != nil {
		return err
	}
	if d.Number <= now.number { // what is listed above it is not the repository's
		return nil
	}
	g, err := k.opener.open(d, k.repo)
	if err != nil {
		return err
	}
	s, err := newRingState(g, d.Number)
	if err != nil {
		return &CorruptError{keyDocName(d.Number), err.Error()}
	}
	if g.Identity != now.ring.Identity || s.newest.number < now.newest.number {
		return &CorruptError{keyDocName(d.Number), "it is older than the keys that were read before it"}
	}
	k.state.Store(s)
	return nil
}

// unknownSet says what to think of an object sealed with keys that are not in the
// repository's.
func (k *keyring) unknownSet(object string, n uint32) error {
	return &CorruptError{object, fmt.Sprintf("it says that it is sealed with generation %d of the keys, and the repository's newest is %d: it is damaged, or keys/ was put back to an older state", n, k.newest().number)}
}

func derive(context string, material ...[]byte) (key [32]byte) {
	var m []byte
	for _, p := range material {
		m = append(m, p...)
	}
	blake3.DeriveKey(key[:], context, m)
	return key
}

// onceKey seals one message, ever: so its nonce is zero.
type onceKey [32]byte

func (k onceKey) seal(dst, plain, aad []byte) []byte {
	return newGCM(k).Seal(dst, zeroNonce[:], plain, aad) //nolint:gosec // G407: one message per key
}

func (k onceKey) open(dst, sealed, aad []byte) ([]byte, error) {
	return newGCM(k).Open(dst, zeroNonce[:], sealed, aad)
}

var zeroNonce [12]byte

// newGCM returns AES-256-GCM. A key of the right length never fails.
func newGCM(key [32]byte) cipher.AEAD {
	g, err := cipher.NewGCM(newAES(key))
	if err != nil {
		panic("store: " + err.Error()) // the block size of AES fits
	}
	return g
}

func newAES(key [32]byte) cipher.Block {
	b, err := aes.NewCipher(key[:])
	if err != nil {
		panic("store: " + err.Error()) // the length of the key fits
	}
	return b
}

func randomKey() (k [32]byte) {
	_, _ = rand.Read(k[:]) // never fails
	return k
}

// maxName is the longest name that can be hidden, in bytes: that of a VM.
const maxName = 64

// hideName returns what stands for a VM's name in object names: the same for equal
// names, so that it can be found, and of one length. It is deterministic authenticated
// encryption in the way of SIV (Rogaway and Shrimpton, 2006): the tag of the name is the
// counter's start.
func (k *keyring) hideName(name string) string {
	p := make([]byte, 16+maxName)
	copy(p[16:], name)
	tag := k.nameTag.sum(p[16:])
	copy(p, tag[:16])
	cipher.NewCTR(newAES(k.nameKey), p[:16]).XORKeyStream(p[16:], p[16:])
	return hex.EncodeToString(p)
}

// showName is the way back. It reports false for what hideName never makes.
func (k *keyring) showName(hidden string) (string, bool) {
	p, err := hex.DecodeString(hidden)
	if err != nil || len(p) != 16+maxName || strings.ToLower(hidden) != hidden {
		return "", false
	}
	cipher.NewCTR(newAES(k.nameKey), p[:16]).XORKeyStream(p[16:], p[16:])
	tag := k.nameTag.sum(p[16:])
	name := strings.TrimRight(string(p[16:]), "\x00")
	return name, subtle.ConstantTimeCompare(tag[:16], p[:16]) == 1
}

// folder returns the part of object names that stands for a VM.
func (r *reader) folder(vm string) string {
	if r.keys == nil {
		return vm
	}
	return r.keys.hideName(vm)
}

// vmOf is the way back from folder.
func (r *reader) vmOf(folder string) (vm string, ok bool) {
	if r.keys == nil {
		return folder, ValidVM(folder) == nil
	}
	vm, ok = r.keys.showName(folder)
	return vm, ok && ValidVM(vm) == nil
}
