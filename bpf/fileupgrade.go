package bpf

import (
	"errors"
	"fmt"
)

// inode is a tracked image file as the programs know it: without a path, by which it could be
// looked at again. That is left to who acquires it.
type inode struct {
	key   filesFileKey
	image filesImage
}

var _ Target = inode{}

// Label implements Target.
func (i inode) Label() string { return fmt.Sprintf("image file %s/%d", i.Number(), i.key.Ino) }

// Number implements Target.
func (i inode) Number() string { return fmt.Sprintf("%d:%d", i.key.Dev>>20, i.key.Dev&(1<<20-1)) }

func (i inode) id() uint64                                { return i.key.Ino }
func (i inode) shape(uint) shape                          { return shape{} } // never registered anew
func (i inode) changed(*Epoch) Loss                       { return 0 }
func (i inode) lookAgain() (Target, error)                { return i, nil }
func (i inode) kernelSectors() (uint64, bool)             { return 0, false }
func (i inode) heatShift() uint32                         { return i.image.HeatShift }
func (i inode) settle() error                             { return nil }
func (i inode) remove(t *Tracker) error                   { return t.removeFile(i.key, i.fs()) }
func (i inode) insert(t *Tracker, _ uint32, _ uint) error { return t.insertFile(i.key, i.image) }

func (i inode) find(t *Tracker) (uint32, bool, error) {
	v, ok, err := t.findFile(i.key)
	return v.Slot, ok, err
}

func (i inode) programs(t *Tracker, attach bool) (programSet, error) {
	h, err := t.hooks(i.fs(), attach)
	if err != nil {
		return nil, err // not h: an interface that holds a nil would not be nil
	}
	return h, nil
}

// fs is the type of its file system; empty if a later version tracks others too.
func (i inode) fs() string {
	for name, fs := range fileSystems {
		if fs.number == i.image.Fs {
			return name
		}
	}
	return ""
}

// inodes are the tracked image files.
func (t *Tracker) inodes() (all []inode, err error) {
	err = t.eachFile(func(k filesFileKey, v filesImage) bool {
		all = append(all, inode{k, v})
		return true
	})
	return all, err
}

// attachAsIn attaches the programs of the file systems whose files old tracks. Where this kernel can't be
// trusted any more, by what this version knows of it, their files are not taken over.
func (t *Tracker) attachAsIn(old *Tracker) error {
	files, err := old.inodes()
	if err != nil {
		return err
	}
	for _, f := range files {
		if _, err := f.programs(t, true); err != nil && !errors.Is(err, ErrNoFileHooks) {
			return err
		}
	}
	return nil
}

// filesOf are the image files of old that t can take over: those of which it has programs. It says which
// are not. The registrations belong to the caller in any case.
func (t *Tracker) filesOf(old *Tracker) (regs []*Registration, lost []string, err error) {
	files, err := old.inodes()
	if err != nil {
		return nil, nil, err
	}
	for _, f := range files {
		r := &Registration{t: old, what: f, slot: f.image.Slot}
		if _, err = f.programs(t, false); err == nil {
			r.programs, err = f.programs(old, false)
		}
		if err == nil {
			err = r.load() // upgrade has locked it
		}
		if err != nil {
			lost = append(lost, fmt.Sprintf("%s was not taken over by an upgrade: %v", f.Label(), err))
			r.closeEpochs()
			continue
		}
		r.Fold()
		regs = append(regs, r)
	}
	return regs, lost, nil
}
