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
}

// Status lists the tracked devices. It takes no lock: a device that is
// swapping epochs may be seen half way.
func (t *Tracker) Status() ([]Status, error) {
	var out []Status
	var key uint32
	var d trackerDevice
	it := t.maps.Devices.Iterate()
	for it.Next(&key, &d) {
		s, err := t.status(key, d)
		if errors.Is(err, os.ErrNotExist) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read the devices: %w", err)
	}
	return out, nil
}

func (t *Tracker) status(key uint32, d trackerDevice) (Status, error) {
	s := Status{Major: key >> 20, Minor: key & (1<<20 - 1), Granule: 1 << d.GranuleShift}
	if sys, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", s.Major, s.Minor)); err == nil {
		s.Name = filepath.Base(sys)
	}
	epochs, err := t.pinnedEpochs(d.Slot)
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
	s.Counts, err = t.counts(d.Slot)
	return s, err
}
