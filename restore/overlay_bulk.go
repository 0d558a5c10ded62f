package restore

import "context"

var _ bulkDisk = (*Overlay)(nil)

// bulkStep is how much of an overlay is looked at as one, in bytes: a multiple of every grain.
const bulkStep = 1 << 20

// readBulk reads what lies in the base past its cache.
func (o *Overlay) readBulk(ctx context.Context, p []byte, off int64) error {
	return o.eachStep(off, len(p), func(at, end int, own bool) error {
		if b, ok := o.base.(bulkDisk); ok && !own {
			return b.readBulk(ctx, p[at:end], off+int64(at))
		}
		return plainBulk{o}.readBulk(ctx, p[at:end], off+int64(at))
	})
}

// differences asks the base what it knows without reading, where nothing was written.
func (o *Overlay) differences(ctx context.Context, have []byte, off int64) (out []Extent, err error) {
	err = o.eachStep(off, len(have), func(at, end int, own bool) error {
		var runs []Extent
		var err error
		if b, ok := o.base.(bulkDisk); ok && !own {
			runs, err = b.differences(ctx, have[at:end], off+int64(at))
		} else {
			runs, err = plainBulk{o}.differences(ctx, have[at:end], off+int64(at))
		}
		for _, r := range runs {
			out = appendRun(out, r)
		}
		return err
	})
	return out, err
}

// eachStep calls f for the steps of n bytes at off; own tells whether something of a step lies
// in the overlay.
func (o *Overlay) eachStep(off int64, n int, f func(at, end int, own bool) error) error {
	for at := 0; at < n; {
		end := min(n, at+bulkStep-int((off+int64(at))%bulkStep))
		set, to := o.bits.run((off+int64(at))/overlayBlock, (off+int64(end)+overlayBlock-1)/overlayBlock)
		own := set || to*overlayBlock < off+int64(end)
		if err := f(at, end, own); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// changedRuns calls f for the ranges that lie in the overlay, ascending, cut to the disk.
func (o *Overlay) changedRuns(f func(Extent) error) error {
	blocks := o.shape.blocks()
	for b := int64(0); b < blocks; {
		set, end := o.bits.run(b, blocks)
		if set {
			e := Extent{Off: b * overlayBlock, Len: min(end*overlayBlock, o.shape.size) - b*overlayBlock}
			if err := f(e); err != nil {
				return err
			}
		}
		b = end
	}
	return nil
}
