package restore

import (
	"bytes"
	"context"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"
)

// plainDisk is a disk in memory, all of it data.
type plainDisk []byte

func (d plainDisk) Size() int64                             { return int64(len(d)) }
func (d plainDisk) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(d).ReadAt(p, off) }

func (d plainDisk) Extents(_ context.Context, off, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		from, to, err := extentSpan(off, n, d.Size())
		if from < to || err != nil {
			yield(Extent{Off: from, Len: to - from}, err)
		}
	}
}

// diskLog is a backing that remembers all that happened to it, so that the state
// after a power cut at any moment can be made.
type diskLog struct {
	start   []byte // durable in the beginning
	current []byte
	ops     []diskOp
}

type diskOp struct {
	sync bool
	off  int64
	data []byte
}

func (l *diskLog) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(l.current).ReadAt(p, off)
}

func (l *diskLog) WriteAt(p []byte, off int64) (int, error) {
	l.ops = append(l.ops, diskOp{off: off, data: bytes.Clone(p)})
	return copy(l.current[off:], p), nil
}

func (l *diskLog) Punch(off, n int64) error {
	_, err := l.WriteAt(make([]byte, n), off)
	return err
}

func (l *diskLog) Datasync() error {
	l.ops = append(l.ops, diskOp{sync: true})
	return nil
}

func (l *diskLog) NextData(off int64) (int64, error) {
	if off >= int64(len(l.current)) {
		return 0, io.EOF
	}
	return off, nil
}

func (l *diskLog) NextHole(int64) (int64, error) { return int64(len(l.current)), nil }
func (l *diskLog) Allocated() (int64, error)     { return int64(len(l.current)), nil }
func (l *diskLog) Close() error                  { return nil }

// cut returns what a power cut after the first n operations may leave: all that
// was synced, and of the rest any sectors in any of the states they had.
func (l *diskLog) cut(n int, rnd *rand.Rand) []byte {
	image := bytes.Clone(l.start)
	synced := 0
	for i, op := range l.ops[:n] {
		if op.sync {
			synced = i
		}
	}
	for i, op := range l.ops[:n] {
		for at := 0; at < len(op.data); {
			end := min(len(op.data), at+512-int(op.off+int64(at))%512)
			if i < synced || rnd.IntN(2) == 0 {
				copy(image[op.off+int64(at):], op.data[at:end])
			}
			at = end
		}
	}
	return image
}

func TestOverlaySurvivesPowerCutAtAnyMoment(t *testing.T) {
	for seed := range uint64(8) {
		powerCuts(t, seed)
	}
}

func powerCuts(t *testing.T, seed uint64) {
	const sector, sectors = 512, 400
	rnd := rand.New(rand.NewPCG(seed, 1))
	base := plainDisk(bytes.Repeat([]byte{0xbb}, sector*sectors))
	shape := overlayShape{size: base.Size(), identity: "x"}
	image := make([]byte, shape.fileSize())
	copy(image, shape.encode())
	log := &diskLog{start: bytes.Clone(image), current: image}
	o := newOverlay(log, base, shape)

	type step struct {
		began    int // operations in the log when it began
		from, to int // sectors
		value    byte
	}
	type ack struct {
		at    int // operations in the log when Sync returned
		steps int // done before it
	}
	var steps []step
	acks := []ack{{}}
	for i := range 60 {
		if rnd.IntN(6) == 0 {
			if err := o.Sync(); err != nil {
				t.Fatal(err)
			}
			acks = append(acks, ack{at: len(log.ops), steps: len(steps)})
			continue
		}
		s := step{began: len(log.ops), from: rnd.IntN(sectors), value: byte(i + 1)}
		s.to = min(sectors, s.from+1+rnd.IntN(1<<rnd.IntN(7)))
		off, n := int64(s.from*sector), int64((s.to-s.from)*sector)
		var err error
		if rnd.IntN(3) == 0 {
			s.value = 0
			err = o.Zero(off, n)
		} else {
			_, err = o.WriteAt(bytes.Repeat([]byte{s.value}, int(n)), off)
		}
		if err != nil {
			t.Fatal(err)
		}
		steps = append(steps, s)
	}

	for cut := range len(log.ops) + 1 {
		after := log.cut(cut, rnd)
		o, err := readOverlay(&diskLog{current: after}, int64(len(after)), base, "x")
		if err != nil {
			t.Fatalf("seed %d, cut after operation %d: %v", seed, cut, err)
		}
		got := make([]byte, sector*sectors)
		if _, err := o.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		last := acks[0]
		for _, a := range acks {
			if a.at <= cut {
				last = a
			}
		}
		for s := range sectors {
			may := []byte{0xbb}
			for i, st := range steps {
				if s < st.from || s >= st.to || st.began >= cut {
					continue
				}
				if i < last.steps {
					may = may[:0]
				}
				may = append(may, st.value)
			}
			have := got[s*sector : (s+1)*sector]
			if !slices.Contains(may, have[0]) || !bytes.Equal(have, bytes.Repeat(have[:1], sector)) {
				t.Fatalf("seed %d, cut after operation %d (synced up to step %d): sector %d is %#x, may be %#x", seed, cut, last.steps, s, have[0], may)
			}
		}
	}
}
