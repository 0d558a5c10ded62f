package store

import "sync/atomic"

// share divides memory among the Writers of one Repo, so that many backups at once need no more than
// a few. Safe for concurrent use.
type share struct{ writers atomic.Int64 }

const (
	// fullShares is how many Writers at once have all the memory they could use. More get their part
	// of that.
	fullShares = 2
	// leastPack is the smallest target of a pack, in bytes: with very many Writers memory
	// grows by some of these for each.
	leastPack = 1 << 20
	// leastGrains is how many grains a session remembers at least.
	leastGrains = 1 << 12
)

// part is what one Writer may use of n now, but at least the lesser of n and least.
func (s *share) part(n, least int) int {
	w := int(s.writers.Load())
	if w <= fullShares {
		return n
	}
	return max(n*fullShares/w, min(n, least))
}
