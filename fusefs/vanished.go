package fusefs

import (
	"context"
	"sync"

	"github.com/hanwen/go-fuse/v2/fs"
)

// vanished has the kernel forget what is no longer in the repository, so that a mount of
// weeks does not keep all points that there ever were. It does so in a goroutine of its own: the
// kernel holds the directory's lock while it waits for the answer to a look-up, and
// takes the same lock to forget.
type vanished struct {
	mu    sync.Mutex
	paths [][]string
	some  chan struct{} // holds one token if there are paths
	done  chan struct{}
}

func watchVanished(ctx context.Context, root fs.InodeEmbedder) *vanished {
	v := &vanished{some: make(chan struct{}, 1), done: make(chan struct{})}
	go v.run(ctx, root)
	return v
}

// tell is given the names from the root down to what is gone.
func (v *vanished) tell(path []string) {
	v.mu.Lock()
	v.paths = append(v.paths, path)
	v.mu.Unlock()
	select {
	case v.some <- struct{}{}:
	default:
	}
}

func (v *vanished) run(ctx context.Context, root fs.InodeEmbedder) {
	defer close(v.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-v.some:
		}
		v.mu.Lock()
		paths := v.paths
		v.paths = nil
		v.mu.Unlock()
		for _, p := range paths {
			forget(root.EmbeddedInode(), p)
		}
	}
}

// forget tells the kernel, unless it has never seen it. Its answer does not matter: it
// may have forgotten by itself, or the mount may be gone.
func forget(dir *fs.Inode, path []string) {
	for len(path) > 1 && dir != nil {
		dir, path = dir.GetChild(path[0]), path[1:]
	}
	if dir == nil {
		return
	}
	if child := dir.GetChild(path[0]); child != nil {
		_ = dir.NotifyDelete(path[0], child)
	}
}

// wait waits until the goroutine has ended, which it does with its context.
func (v *vanished) wait() { <-v.done }
