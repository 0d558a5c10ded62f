package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Status is what is known of one tracked device without taking hold of it.
type Status struct {
	Major, Minor uint32
	Name         string // kernel name now, empty if the device is gone
	Size         int64  // bytes, when registered
	Granule      int64  // bytes
	Epoch        uint64 // current
	Since        time.Time
	Dirty        uint64 // granules marked in the current and the retained epochs; a granule in both counts twice
	Retained     int
	BitmapBytes  int64 // kernel memory of all its epochs
	Taint        Taint
	Loss         Loss
	Counts       Counts
	Heat         Heat
}

// Lost counts, by what it was, the events since the tracker was attached that no device can
// be blamed for.
func (t *Tracker) Lost() map[string]uint64 {
	w := t.hostMap.words
	return map[string]uint64{"no_epoch": w[hostNoEpoch], "passthrough": w[hostPassthrough], "writer_names": w[hostWriters]}
}

// Status lists the tracked devices. It takes no lock: a device that is
// swapping epochs may be seen half way.
func (t *Tracker) Status() ([]Status, error) {
	var out []Status
	var err error
	t.devices.all(func(_ uint32, p place) bool {
		var s Status
		s, err = t.status(p)
		switch {
		case errors.Is(err, os.ErrNotExist):
			err = nil // gone meanwhile
		case err == nil:
			out = append(out, s)
		}
		return err == nil
	})
	return out, err
}

func (t *Tracker) status(p place) (Status, error) {
	s := Status{Major: p.own >> 20, Minor: p.own & (1<<20 - 1), Granule: 1 << p.shift, Heat: t.heat(p)}
	if sys, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", s.Major, s.Minor)); err == nil {
		s.Name = filepath.Base(sys)
	}
	epochs, err := t.pinnedEpochs(p.slot)
	if err != nil {
		return s, err
	}
	for _, e := range epochs {
		s.Since = time.Unix(0, int64(e.hdr(hdrTracked)))
		s.Size, s.Epoch = e.Size(), e.Last()
		s.Dirty += e.Dirty()
		s.BitmapBytes += int64(len(e.mem.mem))
		s.Taint |= e.Taint()
		s.Loss |= e.Loss()
		e.close()
	}
	s.Retained = len(epochs) - 1
	s.Counts, err = t.counts(p.slot)
	return s, err
}
