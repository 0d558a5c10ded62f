package restore

import (
	"bytes"
	"errors"
	"testing"
)

// FuzzReadOverlay reads overlay files of any content. It must end in an overlay that
// can be read and written, or in one of the errors that the package names.
func FuzzReadOverlay(f *testing.F) {
	base := plainDisk(make([]byte, 40<<10+512))
	shape := overlayShape{size: base.Size(), identity: "x"}
	good := make([]byte, shape.fileSize())
	copy(good, shape.encode())
	f.Add(good)
	some := append([]byte(nil), good...)
	some[overlayHeader] = 0xff
	some[overlayHeader+1] = 0x07 // eleven blocks, the last one short
	f.Add(some)
	behind := append([]byte(nil), good...)
	behind[overlayHeader+1] = 0x08
	f.Add(behind)
	f.Add(good[:overlayHeader])
	f.Add(overlayShape{size: 1 << 61, identity: "x"}.encode())
	f.Add(overlayShape{size: base.Size(), identity: "other"}.encode())
	f.Add([]byte(overlayMagic))
	f.Add([]byte{})

	known := []error{ErrNotOverlay, ErrOverlayBase, ErrOverlayCorrupt, ErrOverlayVersion}
	f.Fuzz(func(t *testing.T, content []byte) {
		o, err := readOverlay(&diskLog{current: bytes.Clone(content)}, int64(len(content)), base, "x")
		if err != nil {
			for _, k := range known {
				if errors.Is(err, k) {
					return
				}
			}
			t.Fatalf("unknown error: %v", err)
		}
		p := make([]byte, base.Size())
		if _, err := o.ReadAt(p, 0); err != nil {
			t.Errorf("read: %v", err)
		}
		if _, err := o.WriteAt(p[:5000], 100); err != nil {
			t.Errorf("write: %v", err)
		}
		if err := o.Zero(30<<10, base.Size()-30<<10); err != nil {
			t.Errorf("zero: %v", err)
		}
		for _, err := range o.Extents(t.Context(), 0, base.Size()) {
			if err != nil {
				t.Errorf("extents: %v", err)
			}
		}
		if err := o.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}
