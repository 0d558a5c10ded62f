package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sync"
)

// Overlay is a copy-on-write layer over a base disk: a sparse local file holds the
// blocks that were written, all others are read from the base.
//
// It outlives its process: what a Sync has confirmed is there after a crash or
// power cut. To discard it, close it and remove its file.
//
// It keeps one bit per block of 4 KiB in memory: 32 MiB for a disk of 1 TiB.
//
// It is no [Filer]: while a server sends pages of the file, a Trim may punch
// them out or a write change them, and the peer would see neither state.
type Overlay struct {
	base  Disk
	shape overlayShape
	file  backing
	bits  *blockBitmap
	space *space // nil without a limit

	// A block's way into the overlay (read the base, write the block, set its
	// bit) is under the lock of its region. Where all bits are set already, no
	// lock is needed: bits stay. With a limit every write and hole is under the
	// lock, so that data is counted as what it is.
	regions [regionLocks]sync.Mutex

	sync struct {
		sync.Mutex
		broken error // why nothing can be made durable any more
		closed bool
	}
}

const (
	regionBlocks = 256 // blocks that share a lock: 1 MiB
	regionLocks  = 64

	// manyRegions is from how many blocks on Zero takes all locks at once and
	// makes one hole.
	manyRegions = 4 * regionLocks * regionBlocks
)

var (
	_ WritableDisk    = (*Overlay)(nil)
	_ WriteFiler      = (*Overlay)(nil)
	_ ReaderAtContext = (*Overlay)(nil)
	_ io.Closer       = (*Overlay)(nil)
)

// CreateOverlay makes an empty overlay at path, mode 0600. identity names the base for good
// ("repository id/point id/disk"), in 1 to 1024 bytes: opening the overlay over
// another one is refused. The error is os.ErrExist if path is taken.
//
// The overlay must be closed; the base stays the caller's and must outlive it.
func CreateOverlay(path string, base Disk, identity string) (*Overlay, error) {
	if identity == "" || len(identity) > overlayIdentity {
		return nil, ErrOverlayIdentity
	}
	shape := overlayShape{size: base.Size(), identity: identity}
	f, err := createOverlayFile(path, shape)
	if err != nil {
		return nil, fmt.Errorf("create overlay: %w", err)
	}
	return newOverlay(f, base, shape), nil
}

// OpenOverlay opens the overlay at path over the base it was made for. Its
// errors are [ErrOverlayBusy] while another process (or this one) has it open,
// [ErrOverlayBase] if base has another identity or size, [ErrNotOverlay],
// [ErrOverlayVersion], [ErrOverlayCorrupt], or os.ErrNotExist.
func OpenOverlay(path string, base Disk, identity string) (*Overlay, error) {
	f, err := openOverlayFile(path)
	if err != nil {
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = ErrNotOverlay
	}
	var o *Overlay
	if err == nil {
		o, err = readOverlay(f, st.Size(), base, identity)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open overlay %s: %w", path, err), f.Close())
	}
	return o, nil
}

// OpenOrCreateOverlay opens the overlay at path, or makes it if nothing is there.
func OpenOrCreateOverlay(path string, base Disk, identity string) (*Overlay, error) {
	o, err := OpenOverlay(path, base, identity)
	if !errors.Is(err, os.ErrNotExist) {
		return o, err
	}
	o, err = CreateOverlay(path, base, identity)
	if errors.Is(err, os.ErrExist) { // someone else was faster
		return OpenOverlay(path, base, identity)
	}
	return o, err
}

func newOverlay(f backing, base Disk, shape overlayShape) *Overlay {
	return &Overlay{base: base, shape: shape, file: f, bits: newBlockBitmap(shape.blocks())}
}

// readOverlay checks header and bitmap of a file of fileSize bytes. It does not
// close f.
func readOverlay(f backing, fileSize int64, base Disk, identity string) (*Overlay, error) {
	shape, err := readShape(f)
	if err != nil {
		return nil, err
	}
	if shape.identity != identity {
		return nil, fmt.Errorf("made for %q, not %q: %w", shape.identity, identity, ErrOverlayBase)
	}
	if shape.size != base.Size() {
		return nil, fmt.Errorf("made for a disk of %d bytes, not %d: %w", shape.size, base.Size(), ErrOverlayBase)
	}
	if want := shape.fileSize(); fileSize != want {
		return nil, fmt.Errorf("file has %d bytes instead of %d: %w", fileSize, want, ErrOverlayCorrupt)
	}
	o := newOverlay(f, base, shape)
	page := make([]byte, bitmapPage)
	for i := range o.bits.pages() {
		if _, err := f.ReadAt(page, overlayHeader+int64(i)*bitmapPage); err != nil {
			return nil, err
		}
		if !o.bits.load(i, page) {
			return nil, fmt.Errorf("bitmap names blocks behind the end of the disk: %w", ErrOverlayCorrupt)
		}
	}
	return o, nil
}

// readOverlayShape reads what the header of the file at path says.
func readOverlayShape(path string) (_ overlayShape, err error) {
	f, err := os.Open(path)
	if err != nil {
		return overlayShape{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return readShape(f)
}

func readShape(f io.ReaderAt) (overlayShape, error) {
	head := make([]byte, overlayHeader)
	if n, err := f.ReadAt(head, 0); err != nil {
		if errors.Is(err, io.EOF) {
			return overlayShape{}, fmt.Errorf("only %d bytes: %w", n, ErrNotOverlay)
		}
		return overlayShape{}, err
	}
	return decodeOverlay(head)
}

// Size is that of the base.
func (o *Overlay) Size() int64 { return o.shape.size }

// Allocated is the space that the overlay takes on its file system, in bytes;
// 0 once it is closed.
func (o *Overlay) Allocated() int64 {
	n, err := o.file.Allocated()
	if err != nil {
		return 0
	}
	return n
}

// ReadAt implements io.ReaderAt.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	return o.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt that gives up reading the base when ctx is done.
func (o *Overlay) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	total, eof := readSpan(off, len(p), o.shape.size)
	for done := 0; done < total; {
		at := off + int64(done)
		to := off + int64(total)
		set, endBlock := o.bits.run(at/overlayBlock, (to+overlayBlock-1)/overlayBlock)
		piece := p[done : done+int(min(endBlock*overlayBlock, to)-at)]
		var n int
		var err error
		if set {
			n, err = o.file.ReadAt(piece, o.shape.dataAt()+at)
		} else {
			n, err = readAtContext(ctx, o.base, piece, at)
		}
		done += n
		if n < len(piece) {
			return done, fmt.Errorf("overlay: %w", noEOF(err))
		}
	}
	return total, eof
}

// readAtContext reads with ctx where the disk can.
func readAtContext(ctx context.Context, d Disk, p []byte, off int64) (int, error) {
	if r, ok := d.(ReaderAtContext); ok {
		return r.ReadAtContext(ctx, p, off)
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return d.ReadAt(p, off)
}

// noEOF turns the end of something that should not end here into an error
// that no caller takes for the end of the disk.
func noEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// WriteFile implements [WriteFiler]: blocks that are in the overlay stay where they are.
func (o *Overlay) WriteFile(off, n int64) (fd uintptr, at int64, ok bool) {
	f, plain := o.file.(*sparseFile)
	if !plain || o.space != nil || checkWrite("write", off, n, o.shape.size) != nil ||
		!o.bits.all(off/overlayBlock, (off+n+overlayBlock-1)/overlayBlock) {
		return 0, 0, false
	}
	return f.Fd(), o.shape.dataAt() + off, true
}

// WriteAt implements io.WriterAt. A write outside the disk fails as a whole with [ErrRange].
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := checkWrite("write", off, int64(len(p)), o.shape.size); err != nil {
		return 0, err
	}
	end := off + int64(len(p))
	if o.space == nil && o.bits.all(off/overlayBlock, (end+overlayBlock-1)/overlayBlock) {
		return o.file.WriteAt(p, o.shape.dataAt()+off)
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		piece := p[done:min(len(p), done+int(regionBlocks*overlayBlock-at%(regionBlocks*overlayBlock)))]
		if err := o.writeRegion(piece, at); err != nil {
			return done, err
		}
		done += len(piece)
	}
	return len(p), nil
}

// writeRegion writes p, which lies within one region.
func (o *Overlay) writeRegion(p []byte, off int64) error {
	first, last := off/overlayBlock, (off+int64(len(p))-1)/overlayBlock
	l := o.regionLock(first)
	l.Lock()
	defer l.Unlock()
	if err := o.space.reserve(first, last+1); err != nil {
		return err
	}
	// The ends of p may cover only parts of their blocks.
	if err := o.copyUp(first, off, int64(len(p))); err != nil {
		return err
	}
	if last > first {
		if err := o.copyUp(last, off, int64(len(p))); err != nil {
			return err
		}
	}
	if _, err := o.file.WriteAt(p, o.shape.dataAt()+off); err != nil {
		return err
	}
	o.bits.set(first, last+1)
	return nil
}

func (o *Overlay) regionLock(block int64) *sync.Mutex {
	return &o.regions[block/regionBlocks%regionLocks]
}

// copyUp writes those bytes of block b that a write of n bytes at off leaves out,
// unless the block is in the overlay or the write covers it. The caller holds
// the block's lock; the bit is its to set, after its own bytes are in place.
func (o *Overlay) copyUp(b, off, n int64) error {
	from, to := b*overlayBlock, min((b+1)*overlayBlock, o.shape.size)
	if off <= from && off+n >= to || o.bits.all(b, b+1) {
		return nil
	}
	buf := make([]byte, to-from)
	if m, err := o.base.ReadAt(buf, from); m < len(buf) {
		return fmt.Errorf("copy block at %d into the overlay: %w", from, noEOF(err))
	}
	_, err := o.file.WriteAt(buf, o.shape.dataAt()+from)
	return err
}

// Zero makes [off, off+n) read as zeroes. Whole blocks of 4 KiB become holes of
// the file, where the file system can.
func (o *Overlay) Zero(off, n int64) error {
	if err := checkWrite("zero", off, n, o.shape.size); err != nil {
		return err
	}
	end := off + n
	from := (off + overlayBlock - 1) / overlayBlock // first whole block
	to := end / overlayBlock                        // behind the last
	if end == o.shape.size {
		to = o.shape.blocks() // the last block may be a short one
	}
	if from >= to { // no whole block
		_, err := o.WriteAt(make([]byte, n), off)
		return err
	}
	if head := from*overlayBlock - off; head > 0 {
		if _, err := o.WriteAt(make([]byte, head), off); err != nil {
			return err
		}
	}
	if tail := end - to*overlayBlock; tail > 0 {
		if _, err := o.WriteAt(make([]byte, tail), to*overlayBlock); err != nil {
			return err
		}
	}
	return o.zeroBlocks(from, to)
}

// Trim does what Zero does.
func (o *Overlay) Trim(off, n int64) error { return o.Zero(off, n) }

// zeroBlocks makes holes of the blocks of [from, to).
func (o *Overlay) zeroBlocks(from, to int64) error {
	if o.space == nil && o.bits.all(from, to) {
		return o.punch(from, to)
	}
	if to-from >= manyRegions {
		// Nobody else waits for a second lock while holding one.
		for i := range o.regions {
			o.regions[i].Lock()
			defer o.regions[i].Unlock()
		}
		return o.punchIn(from, to)
	}
	for from < to {
		next := min(to, from-from%regionBlocks+regionBlocks)
		if err := o.punchRegion(from, next); err != nil {
			return err
		}
		from = next
	}
	return nil
}

func (o *Overlay) punchRegion(from, to int64) error {
	l := o.regionLock(from)
	l.Lock()
	defer l.Unlock()
	return o.punchIn(from, to)
}

// punchIn makes holes and takes the blocks into the overlay. It punches also where the
// bit is not set: bytes whose Sync never came may lie there.
func (o *Overlay) punchIn(from, to int64) error {
	if err := o.punch(from, to); err != nil {
		return err
	}
	o.bits.set(from, to)
	return nil
}

func (o *Overlay) punch(from, to int64) error {
	if err := o.file.Punch(o.shape.dataAt()+from*overlayBlock, (to-from)*overlayBlock); err != nil {
		return err
	}
	o.space.free(from, to)
	return nil
}

// Sync makes all writes that completed before it durable.
//
// Once it failed to do so, the kernel may have dropped what it could not write; so from then
// on it fails always, and the overlay must be closed.
func (o *Overlay) Sync() error {
	o.sync.Lock()
	defer o.sync.Unlock()
	if o.sync.closed {
		return fmt.Errorf("sync overlay: %w", os.ErrClosed)
	}
	return o.syncLocked()
}

func (o *Overlay) syncLocked() error {
	if o.sync.broken != nil {
		return o.sync.broken
	}
	// The pages are taken first: the bits in them are of blocks whose data was
	// written, so the data is durable before they are.
	pages := o.bits.take()
	if err := o.datasync(); err != nil {
		return err
	}
	if len(pages) == 0 {
		return nil
	}
	for _, p := range pages {
		if _, err := o.file.WriteAt(p.bytes, overlayHeader+int64(p.index)*bitmapPage); err != nil {
			o.bits.putBack(pages)
			return fmt.Errorf("sync overlay: %w", err)
		}
	}
	return o.datasync()
}

func (o *Overlay) datasync() error {
	if err := o.file.Datasync(); err != nil {
		o.sync.broken = fmt.Errorf("sync overlay: writes may be lost: %w", err)
		return o.sync.broken
	}
	return nil
}

// Close syncs the overlay and frees it for others. It is closed also if the
// sync fails. A second Close does nothing.
func (o *Overlay) Close() error {
	o.sync.Lock()
	defer o.sync.Unlock()
	if o.sync.closed {
		return nil
	}
	o.sync.closed = true
	return errors.Join(o.syncLocked(), o.file.Close())
}

// Extents joins the overlay's extents with those of the base. Holes of the
// overlay's file are zeroes.
func (o *Overlay) Extents(ctx context.Context, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		at, to, err := extentSpan(off, n, o.shape.size)
		if err != nil {
			yield(Extent{}, err)
			return
		}
		m := &extentMerger{yield: yield}
		for at < to {
			if err := ctx.Err(); err != nil {
				m.fail(err)
				return
			}
			set, endBlock := o.bits.run(at/overlayBlock, (to+overlayBlock-1)/overlayBlock)
			end := min(endBlock*overlayBlock, to)
			more := o.baseExtents
			if set {
				more = o.ownExtents
			}
			if !more(ctx, m, at, end) {
				return
			}
			at = end
		}
		m.flush()
	}
}

// baseExtents adds what the base says of [from, to). It returns false when the sequence is over.
func (o *Overlay) baseExtents(ctx context.Context, m *extentMerger, from, to int64) bool {
	for e, err := range o.base.Extents(ctx, from, to-from) {
		if err != nil {
			m.fail(err)
			return false
		}
		if !m.add(e.Off, e.Off+e.Len, e.Zero) {
			return false
		}
	}
	return true
}

// ownExtents adds data and holes of the file for [from, to), as baseExtents does.
func (o *Overlay) ownExtents(ctx context.Context, m *extentMerger, from, to int64) bool {
	return addHoles(ctx, m, o.file, o.shape.dataAt(), from, to)
}
