package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// The layout of a map node, see docs/format.md.
const (
	nodeMagic   = "TMN"
	nodeVersion = 1

	fanOut     = 64 // children of a node: one bit each in a word
	fanOutBits = 6

	nodeHeaderLen = 16
	nodeChildLen  = 32 + 1 + 4
	maxNodeLen    = nodeHeaderLen + fanOut*(16+nodeChildLen)

	// maxLevel is the height of a map of [maxDisk] bytes with grains of 4 KiB.
	maxLevel = 7
)

// node is a decoded map node: immutable.
type node struct {
	level   uint8
	present uint64
	refs    []Ref // of the children present, ascending
}

// cost is the memory of a node, roughly, in bytes.
func (n *node) cost() int64 { return int64(len(n.refs))*52 + 128 }

// child returns child i, 0 to 63; the zero Ref if it is absent.
func (n *node) child(i int) Ref {
	if n.present&(1<<i) == 0 {
		return Ref{}
	}
	return n.refs[bits.OnesCount64(n.present&(1<<i-1))]
}

// encodeNode writes a node. Equal children give equal bytes.
func encodeNode(level uint8, children *[fanOut]Ref) []byte {
	var packs []PackID
	var tail []byte
	var present uint64
	for i, c := range children {
		if c.IsZero() {
			continue
		}
		present |= 1 << i
		p := 0
		for p < len(packs) && packs[p] != c.Pack {
			p++
		}
		if p == len(packs) {
			packs = append(packs, c.Pack)
		}
		tail = append(tail, c.Hash[:]...)
		tail = append(tail, byte(p))
		tail = binary.LittleEndian.AppendUint32(tail, c.Ord)
	}
	b := make([]byte, 0, nodeHeaderLen+16*len(packs)+len(tail))
	b = append(b, nodeMagic...)
	b = append(b, nodeVersion, level, byte(len(packs)), 0, 0)
	b = binary.LittleEndian.AppendUint64(b, present)
	for _, id := range packs {
		b = append(b, id[:]...)
	}
	return append(b, tail...)
}

// decodeNode reads a node. It takes only what encodeNode writes.
func decodeNode(p []byte) (*node, error) {
	if len(p) < nodeHeaderLen || len(p) > maxNodeLen || string(p[:3]) != nodeMagic {
		return nil, errors.New("not a map node")
	}
	if p[3] != nodeVersion {
		return nil, fmt.Errorf("%w: map node version %d", ErrVersion, p[3])
	}
	n := &node{level: p[4], present: binary.LittleEndian.Uint64(p[8:])}
	packs, count := int(p[5]), bits.OnesCount64(n.present)
	switch {
	case n.level > maxLevel, p[6] != 0, p[7] != 0:
		return nil, errors.New("bad map node header")
	case count == 0:
		return nil, errors.New("map node without children")
	case len(p) != nodeHeaderLen+16*packs+nodeChildLen*count:
		return nil, errors.New("map node of wrong length")
	}
	ids := make([]PackID, packs)
	seen := make(map[PackID]struct{}, packs)
	p = p[nodeHeaderLen:]
	for i := range ids {
		copy(ids[i][:], p)
		p = p[16:]
		seen[ids[i]] = struct{}{}
	}
	if len(seen) != packs {
		return nil, errors.New("map node names a pack twice")
	}
	n.refs = make([]Ref, count)
	next := 0 // the table is in the order of first use
	for i := range n.refs {
		at := int(p[32])
		if at > next || at >= packs {
			return nil, errors.New("map node with a bad pack table")
		}
		if at == next {
			next++
		}
		n.refs[i] = Ref{Hash: Hash(p[:32]), Pack: ids[at], Ord: binary.LittleEndian.Uint32(p[33:])}
		if n.refs[i].IsZero() {
			return nil, errors.New("map node with a child that is present and zero")
		}
		p = p[nodeChildLen:]
	}
	if next != packs {
		return nil, errors.New("map node with an unused pack")
	}
	return n, nil
}
