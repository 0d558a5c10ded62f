package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
)

// RepoStats says what a repository holds and what for. All sizes are bytes.
type RepoStats struct {
	Points  int   `json:"points"`
	Logical int64 `json:"logical"` // the disks of all points
	Data    int64 `json:"data"`    // of it, what is not zeroes

	Content int64 `json:"content"` // different grains that points need, uncompressed
	Stored  int64 `json:"stored"`  // what these and the maps take in packs
	Maps    int64 `json:"maps"`    // of Stored, the maps
	Garbage int64 `json:"garbage"` // in packs, needed by no point; running backups may need it

	Packs     int   `json:"packs"`      // objects
	PackBytes int64 `json:"pack_bytes"` // their sizes

	VMs []UseStats `json:"vms"`
	// Each point, in the order of VM and time. Nil unless asked for.
	EachPoint []UseStats `json:"each_point,omitempty"`

	// Damaged says which points and packs could not be counted in whole, and why.
	Damaged []string `json:"damaged,omitempty"`
}

// Dedup is how much data stands for each byte of content; 1 if there is none.
func (s *RepoStats) Dedup() float64 { return ratio(s.Data, s.Content) }

// Compression is how much content each stored byte of a grain holds; 1 if there is none.
func (s *RepoStats) Compression() float64 { return ratio(s.Content, s.Stored-s.Maps) }

func ratio(a, b int64) float64 {
	if b <= 0 {
		return 1
	}
	return float64(a) / float64(b)
}

// UseStats says what one VM or one point uses.
type UseStats struct {
	VM      string    `json:"vm"`
	Point   PointName `json:"point,omitzero"` // zero for a VM
	Points  int       `json:"points"`
	Logical int64     `json:"logical"`
	Data    int64     `json:"data"`
	// Unique is what would be garbage without it, in bytes of packs.
	Unique int64 `json:"unique"`
}

// Stats counts. Each node is read four times at most, however many points share it.
// Memory: 4 bytes per record that is needed, 8 more per node, and some 200 per pack: 1.1 GiB for 16
// TiB stored as grains of 64 KiB. progress may be nil.
func (r *Repo) Stats(ctx context.Context, each bool, progress func(done, total int64)) (RepoStats, error) {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	rd, err := newReader(r.blobs, r.repo, r.codec, r.keys)
	if err != nil {
		return RepoStats{}, err
	}
	c := &census{repo: r, r: rd, users: map[PackID]*usedPack{}}
	if err := c.run(ctx, each, progress); err != nil {
		return RepoStats{}, fmt.Errorf("stats: %w", err)
	}
	return c.out, nil
}

// user says who needs a record: nobody (0), one point, several points of one VM, or several VMs.
type user uint32

const (
	userVM  user = 1 << 30 // with the VM's number
	userAll user = 1 << 31
)

// usedPack is what is known of the records of a pack, by ordinal.
type usedPack struct {
	users  []user
	grains []int64 // below a node, plus 1; only for nodes
}

type census struct {
	repo   *Repo
	r      *reader
	users  map[PackID]*usedPack
	vmOf   []int // VM number of each point
	points []UseStats
	out    RepoStats
}

func (c *census) run(ctx context.Context, each bool, progress func(done, total int64)) error {
	names, err := c.repo.allPoints(ctx)
	if err != nil {
		return err
	}
	for i, n := range names {
		progress(int64(i), int64(len(names)))
		if err := c.point(ctx, n); err != nil {
			return err
		}
	}
	if err := c.packs(ctx); err != nil {
		return err
	}
	for i := range c.out.VMs {
		v := &c.out.VMs[i]
		c.out.Points += v.Points
		c.out.Logical += v.Logical
		c.out.Data += v.Data
	}
	if each {
		c.out.EachPoint = c.points
	}
	return nil
}

func (c *census) point(ctx context.Context, n PointName) error {
	p, err := c.repo.Point(ctx, n)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil // forgotten meanwhile
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
		c.out.Damaged = append(c.out.Damaged, err.Error())
		return nil
	case err != nil:
		return err
	}
	vm := slices.IndexFunc(c.out.VMs, func(v UseStats) bool { return v.VM == n.VM })
	if vm < 0 {
		vm = len(c.out.VMs)
		c.out.VMs = append(c.out.VMs, UseStats{VM: n.VM})
	}
	c.vmOf = append(c.vmOf, vm)
	use := UseStats{VM: n.VM, Point: n, Points: 1}
	for i := range p.Disks {
		root := p.Disks[i].Root
		use.Logical += root.Size
		grains, err := c.node(ctx, root.Ref, int(root.Level), user(len(c.vmOf)))
		if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrVersion) {
			c.out.Damaged = append(c.out.Damaged, fmt.Sprintf("%s: %v", n, err))
			err = nil
		}
		if err != nil {
			return err
		}
		use.Data += min(grains*int64(root.Grain), root.Size)
	}
	c.points = append(c.points, use)
	v := &c.out.VMs[vm]
	v.Points++
	v.Logical += use.Logical
	v.Data += use.Data
	return nil
}

// claim notes that a point needs a record, and tells whether that was news.
func (c *census) claim(ref Ref, by user) (news bool) {
	p := c.users[ref.Pack]
	if p == nil {
		p = &usedPack{}
		c.users[ref.Pack] = p
	}
	if n := int(ref.Ord) + 1 - len(p.users); n > 0 {
		p.users = append(p.users, make([]user, n)...)
	}
	was := p.users[ref.Ord]
	now := c.join(was, by)
	p.users[ref.Ord] = now
	return now != was
}

func (c *census) join(was, by user) user {
	vm := userVM | user(c.vmOf[by-1])
	switch {
	case was == 0:
		return by
	case was == by, was == vm, was == userAll:
		return was
	case was < userVM && c.vmOf[was-1] == c.vmOf[by-1]:
		return vm
	}
	return userAll
}

// node counts the grains below a node. What is below one that is known to be needed by as many is.
func (c *census) node(ctx context.Context, ref Ref, level int, by user) (int64, error) {
	if ref.IsZero() {
		return 0, ctx.Err()
	}
	news := c.claim(ref, by)
	p := c.users[ref.Pack]
	if !news && int(ref.Ord) < len(p.grains) && p.grains[ref.Ord] > 0 {
		return p.grains[ref.Ord] - 1, ctx.Err()
	}
	n, err := c.r.node(ctx, ref, uint8(level))
	if err != nil {
		return 0, err
	}
	grains := int64(0)
	for _, child := range n.refs {
		if level == 0 {
			c.claim(child, by)
			grains++
			continue
		}
		below, err := c.node(ctx, child, level-1, by)
		if err != nil {
			return 0, err
		}
		grains += below
	}
	if n := int(ref.Ord) + 1 - len(p.grains); n > 0 {
		p.grains = append(p.grains, make([]int64, n)...)
	}
	p.grains[ref.Ord] = grains + 1
	return grains, nil
}

// packs reads the indexes of all packs and sums up.
func (c *census) packs(ctx context.Context) error {
	generations := map[PackID][]packObjectInfo{}
	for p, err := range c.repo.packObjects(ctx, packPrefix) {
		if err != nil {
			return err
		}
		c.out.Packs++
		c.out.PackBytes += p.size
		generations[p.Pack] = append(generations[p.Pack], p)
	}
	for id, all := range generations {
		// Older ones are left by a compaction that is under way, or was interrupted.
		newest := slices.MaxFunc(all, func(a, b packObjectInfo) int { return cmp.Compare(a.Generation, b.Generation) })
		for _, p := range all {
			if p.Generation < newest.Generation {
				c.out.Garbage += p.size
			}
		}
		x, err := c.r.loadGeneration(ctx, id, newest.Generation)
		switch {
		case errors.Is(err, ErrNotFound):
			continue // collected or compacted meanwhile
		case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
			c.out.Damaged = append(c.out.Damaged, err.Error())
			continue
		case err != nil:
			return err
		}
		c.pack(id, x)
	}
	return nil
}

func (c *census) pack(id PackID, x *packIndex) {
	var users []user
	if p := c.users[id]; p != nil {
		users = p.users
	}
	for ord := range x.count() {
		e, _ := x.entry(uint32(ord))
		if e.absent() {
			continue
		}
		if ord >= len(users) || users[ord] == 0 {
			c.out.Garbage += int64(e.stored)
			continue
		}
		cost := int64(e.stored) + packEntryLen
		c.out.Stored += cost
		if x.kind == kindNode {
			c.out.Maps += cost
		} else {
			c.out.Content += int64(e.raw)
		}
		switch u := users[ord]; {
		case u < userVM:
			c.points[u-1].Unique += cost
			c.out.VMs[c.vmOf[u-1]].Unique += cost
		case u < userAll:
			c.out.VMs[u&^userVM].Unique += cost
		}
	}
}
