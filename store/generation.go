package store

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"sync"

	"github.com/tidemark/tidemark/store/blob"
)

// A compacted pack keeps its ID and its ordinals and lies in a new object:
// packs/<2 hex>/<32 hex>.<generation>, from 2 on. The plain name is generation
// 1. The newest holds all that is alive; older ones are deleted once it is
// durable.

// packObject returns the name of the object that holds a generation of a pack.
func packObject(id PackID, generation uint32) string {
	if generation <= 1 {
		return packName(id)
	}
	return packName(id) + "." + strconv.FormatUint(uint64(generation), 10)
}

// parsePackObject reads the name of an object, or returns false if it is not
// that of a pack.
func parsePackObject(name string) (id PackID, generation uint32, ok bool) {
	base := name[strings.LastIndexByte(name, '/')+1:]
	base, digits, later := strings.Cut(base, ".")
	generation = 1
	if later {
		g, err := strconv.ParseUint(digits, 10, 32)
		if err != nil {
			return PackID{}, 0, false
		}
		generation = uint32(g)
	}
	if id.UnmarshalText([]byte(base)) != nil || packObject(id, generation) != name || later && generation < 2 {
		return PackID{}, 0, false
	}
	return id, generation, true
}

// packAt is one object of a pack.
type packAt struct {
	Pack       PackID `json:"pack"`
	Generation uint32 `json:"generation"`
}

func (p packAt) object() string { return packObject(p.Pack, p.Generation) }

// packObjectInfo is one object of a pack with its size in bytes.
type packObjectInfo struct {
	packAt
	size int64
}

// packObjects yields the objects of packs whose names begin with prefix, in the order of their names. Others
// are passed over. After an error nothing follows.
func (r *reader) packObjects(ctx context.Context, prefix string) iter.Seq2[packObjectInfo, error] {
	return func(yield func(packObjectInfo, error) bool) {
		for info, err := range r.blobs.List(ctx, prefix) {
			id, generation, ok := parsePackObject(info.Name)
			if err == nil && !ok {
				continue
			}
			if !yield(packObjectInfo{packAt{id, generation}, info.Size}, err) {
				return
			}
		}
	}
}

// newestGeneration asks the repository for the newest generation of a pack. It
// costs one listing. 0 means that there is no object of it.
func (r *reader) newestGeneration(ctx context.Context, id PackID) (uint32, error) {
	newest := uint32(0)
	for p, err := range r.packObjects(ctx, packName(id)) {
		if err != nil {
			return 0, fmt.Errorf("look for pack %s: %w", id, err)
		}
		if p.Pack == id {
			newest = max(newest, p.Generation)
		}
	}
	return newest, nil
}

// generations remembers which packs were found compacted, so that their old
// names are not asked for again. It is a hint: forgetting costs a request.
type generations struct {
	mu sync.Mutex
	of map[PackID]uint32
}

// maxGenerations bounds the memory of generations: some 3 MiB.
const maxGenerations = 1 << 16

func (g *generations) get(id PackID) uint32 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return max(g.of[id], 1)
}

func (g *generations) set(id PackID, generation uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if generation <= 1 {
		delete(g.of, id)
		return
	}
	if g.of == nil || len(g.of) >= maxGenerations {
		g.of = map[PackID]uint32{}
	}
	g.of[id] = generation
}

// maxMoves is how often a pack may move away while one record is read. A
// compaction takes longer than a read by far; this ends what would be a loop.
const maxMoves = 5

// following calls read with the pack's index, and again with that of the newest
// generation when the object turns out to be gone.
func (r *reader) following(ctx context.Context, id PackID, read func(*packIndex) error) error {
	for move := 0; ; move++ {
		x, err := r.index(ctx, id)
		if err != nil {
			return err
		}
		err = read(x)
		if !errors.Is(err, blob.ErrNotFound) {
			return err
		}
		if move == maxMoves {
			return missing(packObject(id, x.generation), err)
		}
		r.packs.drop(id, x)
	}
}

// missing turns the absence of an object that is referred to into corruption.
func missing(name string, err error) error {
	if errors.Is(err, blob.ErrNotFound) {
		return &CorruptError{name, "the object is missing"}
	}
	return err
}
