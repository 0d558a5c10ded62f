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
	Name         string // kernel name now, empty if the device is gone; of an image file, where it lies
	Image        bool   // an image file; Major and Minor are its file system's
	Inode        uint64 // of an image file
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

// Is tells whether s speaks of what.
func (s Status) Is(what Target) bool {
	if what.Number() != fmt.Sprintf("%d:%d", s.Major, s.Minor) {
		return false
	}
	f, file := what.(File)
	return file == s.Image && (!file || f.Inode == s.Inode)
}

// Lost counts, by what it was, the events since the tracker was attached that no device can
// be blamed for.
func (t *Tracker) Lost() map[string]uint64 {
	w := t.hostMap.words
	return map[string]uint64{"no_epoch": w[hostNoEpoch], "passthrough": w[hostPassthrough], "writer_names": w[hostWriters]}
}

// Status lists the tracked devices and image files. It takes no lock: one that is
// swapping epochs may be seen half way. Beside an error stands what could be read of the others.
func (t *Tracker) Status() ([]Status, error) {
	var out []Status
	var errs []error
	add := func(s Status, slot, heatShift uint32) bool {
		s, err := t.status(s, slot, heatShift)
		switch {
		case errors.Is(err, os.ErrNotExist): // gone meanwhile
		case err != nil:
			errs = append(errs, fmt.Errorf("%d:%d %s: %w", s.Major, s.Minor, s.Name, err))
		default:
			out = append(out, s)
		}
		return true
	}
	t.devices.all(func(_ uint32, p place) bool {
		s := Status{Major: p.own >> 20, Minor: p.own & (1<<20 - 1), Granule: 1 << p.shift}
		if sys, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", s.Major, s.Minor)); err == nil {
			s.Name = filepath.Base(sys)
		}
		return add(s, p.slot, p.heatShift)
	})
	err := t.eachFile(func(k filesFileKey, f filesImage) bool {
		s := Status{Major: uint32(k.Dev >> 20), Minor: uint32(k.Dev & (1<<20 - 1)), Granule: 1 << f.GranuleShift, Image: true, Inode: k.Ino}
		s.Name = fmt.Sprintf("inode %d of a file system that is not mounted here", k.Ino)
		_ = mounts(func(_ uint64, m mount) bool {
			if m.dev == k.Dev {
				s.Name = fmt.Sprintf("inode %d below %s", k.Ino, m.dir)
			}
			return m.dev != k.Dev
		})
		return add(s, f.Slot, f.HeatShift)
	})
	return out, errors.Join(append(errs, err)...)
}

func (t *Tracker) status(s Status, slot, heatShift uint32) (Status, error) {
	epochs, err := t.pinnedEpochs(slot)
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
		if s.Image && e.hdr(hdrClosed) == 0 && hooksChanged(e.hdr(hdrHooks), t.hookChanges()) {
			s.Loss |= LossHooks // it will be
		}
		e.close()
	}
	s.Retained = len(epochs) - 1
	s.Heat = t.heat(slot, heatShift, uint64(s.Size)/512)
	s.Counts, err = t.counts(slot)
	return s, err
}
