package appliance

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/tidemark/tidemark/guestfs"
)

// Volumes implements [guestfs.Files].
func (d *Disk) Volumes(ctx context.Context) ([]guestfs.Volume, error) {
	d.pool.mu.Lock()
	known := d.volumes
	d.pool.mu.Unlock()
	if known != nil {
		return slices.Clone(known), nil
	}
	b, err := d.ask(ctx, &request{op: opVolumes}, answerTime)
	if err != nil {
		return nil, err
	}
	vs, err := decodeVolumes(b)
	if err != nil {
		return nil, err
	}
	d.pool.mu.Lock()
	defer d.pool.mu.Unlock()
	d.volumes = vs
	return slices.Clone(vs), nil
}

// Tree implements [guestfs.Files]. It mounts the volume.
func (d *Disk) Tree(ctx context.Context, volume string) (guestfs.Tree, error) {
	t := &tree{disk: d, volume: volume}
	if _, err := d.ask(ctx, &request{op: opMount, volume: volume}, mountTime); err != nil {
		return nil, err
	}
	return t, nil
}

// tree asks anew for each call: an appliance may end and another answer.
type tree struct {
	disk   *Disk
	volume string
}

func (t *tree) ask(ctx context.Context, o op, path string, off, n int64) ([]byte, error) {
	// Another appliance mounts the volume first.
	return t.disk.ask(ctx, &request{op: o, volume: t.volume, path: path, off: off, n: n}, mountTime)
}

// Lstat implements [guestfs.Tree].
func (t *tree) Lstat(ctx context.Context, path string) (guestfs.Attr, error) {
	b, err := t.ask(ctx, opLstat, path, 0, 0)
	if err != nil {
		return guestfs.Attr{}, err
	}
	d := decoder{b: b}
	a := d.attr()
	return a, d.end()
}

// ReadDir implements [guestfs.Tree].
func (t *tree) ReadDir(ctx context.Context, path string) iter.Seq2[guestfs.DirEntry, error] {
	return func(yield func(guestfs.DirEntry, error) bool) {
		var cookie int64
		for {
			b, err := t.ask(ctx, opReadDir, path, cookie, 0)
			var page dirPage
			if err == nil {
				page, err = decodeDirPage(b)
			}
			if err == nil && !page.last && page.next == cookie {
				err = fmt.Errorf("%w: a directory without end", errWire)
			}
			if err != nil {
				yield(guestfs.DirEntry{}, err)
				return
			}
			for _, e := range page.entries {
				if !yield(e, nil) {
					return
				}
			}
			if page.last {
				return
			}
			cookie = page.next
		}
	}
}

// Readlink implements [guestfs.Tree].
func (t *tree) Readlink(ctx context.Context, path string) (string, error) {
	b, err := t.ask(ctx, opReadlink, path, 0, 0)
	if err != nil {
		return "", err
	}
	d := decoder{b: b}
	to := d.string()
	if len(to) > syscall.PathMax {
		d.fail("length of a link")
	}
	return to, d.end()
}

// Xattrs implements [guestfs.Tree].
func (t *tree) Xattrs(ctx context.Context, path string) (map[string][]byte, error) {
	b, err := t.ask(ctx, opXattrs, path, 0, 0)
	if err != nil {
		return nil, err
	}
	return decodeXattrs(b)
}

// Open implements [guestfs.Tree].
func (t *tree) Open(_ context.Context, path string) (guestfs.File, error) { return &file{t, path}, nil }

type file struct {
	tree *tree
	path string
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	return f.ReadAtContext(context.Background(), p, off)
}

// pieces is how many parts of a large read are asked for at once.
const pieces = 4

// ReadAtContext implements [guestfs.File].
func (f *file) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	const piece = 256 << 10
	got := make([]int, (len(p)+piece-1)/piece)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(pieces)
	for i := range got {
		g.Go(func() error {
			part := p[i*piece : min((i+1)*piece, len(p))]
			b, err := f.tree.ask(gctx, opRead, f.path, off+int64(i*piece), int64(len(part)))
			if err != nil {
				return err
			}
			got[i], err = decodeRead(b, part)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	n := 0
	for i, k := range got {
		n += k
		if k < min(piece, len(p)-i*piece) {
			return n, io.EOF
		}
	}
	return n, nil
}

// Seek implements [guestfs.File].
func (f *file) Seek(ctx context.Context, off int64, hole bool) (int64, error) {
	o := opSeekData
	if hole {
		o = opSeekHole
	}
	b, err := f.tree.ask(ctx, o, f.path, off, 0)
	if err != nil {
		return 0, err
	}
	d := decoder{b: b}
	at := d.int()
	if at < off {
		d.fail("offset")
	}
	return at, d.end()
}
