package store

import (
	"bytes"
	"context"
	"testing"
	"time"
)

// zeroed makes a point: writes, then runs of zeroes.
func zeroed(t *testing.T, r *Repo, o DiskOptions, write, zero func(ctx context.Context, d *DiskWriter) error) *Point {
	t.Helper()
	w, err := r.Begin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Abort() }()
	o.Name = "disk0"
	d, err := w.Disk(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []func(context.Context, *DiskWriter) error{write, zero} {
		if err := f(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	p, err := w.Commit(t.Context(), testPoint("disk0"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestZeroIsAWriteOfZeroes(t *testing.T) {
	r := testRepo(t)
	const size = 20<<20 + 1000
	image := noise(1, size)
	clear(image[6<<20 : 9<<20])
	put := func(ctx context.Context, d *DiskWriter) error { return d.Write(ctx, 0, image) }
	cut := func(ctx context.Context, d *DiskWriter) error { return d.Zero(ctx, 2<<20, 8<<20) }
	first := zeroed(t, r, DiskOptions{Size: size}, put, cut)
	clear(image[2<<20 : 10<<20])
	wantDisk(t, r, first, image)

	// Over the parent's content and over what was written just now, up to the end of the disk.
	more := noise(2, 1<<20)
	second := zeroed(t, r, DiskOptions{Size: size},
		func(ctx context.Context, d *DiskWriter) error { return d.Write(ctx, 4<<20, more) },
		func(ctx context.Context, d *DiskWriter) error { return d.Zero(ctx, 4<<20+k64, size-4<<20-k64) })
	clear(image[4<<20:])
	copy(image[4<<20:], more[:k64])
	wantDisk(t, r, second, image)
	wantClean(t, r, second)
	if s := second.Disks[0].Stats; s.Changed != 10<<20+1000+k64 {
		t.Errorf("stats %+v", s)
	}
	same := zeroed(t, r, DiskOptions{Size: size}, func(context.Context, *DiskWriter) error { return nil }, cut2(6<<20))
	if s := same.Disks[0].Stats; s != (Stats{}) {
		t.Errorf("zeroes over zeroes: %+v", s)
	}
}

func cut2(n int64) func(context.Context, *DiskWriter) error {
	return func(ctx context.Context, d *DiskWriter) error { return d.Zero(ctx, 8<<20, n) }
}

func TestZeroOfAVastDiskIsQuick(t *testing.T) {
	r := testRepo(t)
	const size = 64 << 40
	begin := time.Now()
	p := zeroed(t, r, DiskOptions{Size: size},
		func(ctx context.Context, d *DiskWriter) error {
			return d.Write(ctx, 32<<40, bytes.Repeat([]byte{7}, k64))
		},
		func(ctx context.Context, d *DiskWriter) error { return d.Zero(ctx, 0, size) })
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("64 TiB of zeroes took %v", took)
	}
	if !p.Disks[0].Root.Ref.IsZero() {
		t.Error("something is left")
	}
}
