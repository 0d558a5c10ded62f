package cbt

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tidemark/tidemark/bpf"
)

// ErrNotSaved is wrapped when the tracking of a device can't be saved: then there is no
// saved state of it, and the device is as it was.
var ErrNotSaved = errors.New("its tracking is not saved")

// State keeps the tracking of devices in a directory while the host is down. It is saved
// when nobody writes any more, used once, and only in the boot after.
type State struct {
	// Dir is the directory; it is made when something is saved. No state is kept if empty.
	Dir string
	// Trust uses a state also where nothing proves that no other system wrote to the
	// device since it was saved.
	Trust bool
	// Boot and Wtmp replace the kernel's boot ID and /var/log/wtmp in tests.
	Boot func() (string, error)
	Wtmp string
}

func (v State) boot() (string, error) {
	if v.Boot != nil {
		return v.Boot()
	}
	return bpf.BootID()
}

// file is where the state of the device with that identity lies.
func (v State) file(id bpf.Identity) string {
	sum := sha256.Sum256([]byte(id.Name))
	return filepath.Join(v.Dir, hex.EncodeToString(sum[:16])+".state")
}

// settleLimit is how long a state may take until a write after it would show.
const settleLimit = 3 * time.Second

// Save saves the tracking of the device at path for the next boot, and makes the device
// read-only until somebody tracks it or backs it up again, or the host is started anew. Errors
// wrap ErrNotSaved.
func (v State) Save(tracker *bpf.Tracker, path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w: %w", path, ErrNotSaved, err)
		}
	}()
	dev, err := bpf.Lookup(path)
	if err != nil {
		return err
	}
	id, err := dev.Identity()
	if err != nil {
		return err
	}
	reg, err := tracker.Acquire(dev)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	if loss := reg.Changed(); loss != 0 {
		return errors.New(strings.Join(loss.Reasons(), "; "))
	}
	// An older one may not outlive a failure from here on.
	if err := v.remove(id); err != nil {
		return err
	}
	claim, err := dev.Claim()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, claim.Close()) }()
	if err := unused(claim); err != nil {
		return err
	}
	if err := v.lockOut(id, claim); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.remove(id), v.letIn(id, dev))
		}
	}()
	// Whoever opened it in between.
	if err := unused(claim); err != nil {
		return err
	}
	if err := claim.Sync(); err != nil {
		return err
	}
	state, err := v.closeForGood(reg)
	if err != nil {
		return err
	}
	if id, err = settled(dev); err != nil {
		return err
	}
	state.Device, state.Proof = id.Name, id.Proof
	if err := v.write(id, state); err != nil {
		return err
	}
	// All that was written is in the state if nothing was since its epoch ended.
	after, err := reg.Swap()
	if err != nil {
		return err
	}
	if why := judge(after); len(why) > 0 {
		return errors.New(strings.Join(why, "; "))
	}
	if after.Dirty() > 0 || after.Sectors() > 0 || after.Landed() > 0 {
		return errors.New("somebody wrote to it meanwhile")
	}
	return nil
}

// lockOut makes the device read-only, unless it is. What remembers that comes first, in case
// this process is killed.
func (v State) lockOut(id bpf.Identity, claim *bpf.Claim) error {
	if ro, err := claim.ReadOnly(); ro || err != nil {
		return err
	}
	boot, err := v.boot()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(v.Dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(v.file(id)+".readonly", []byte(boot), 0o600); err != nil {
		return err
	}
	return claim.SetReadOnly(true)
}

// letIn makes the device writable, if lockOut made it read-only in this boot.
func (v State) letIn(id bpf.Identity, dev bpf.Device) error {
	file := v.file(id) + ".readonly"
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	boot, err := v.boot()
	if err != nil {
		return err
	}
	if string(b) == boot {
		if err := dev.SetReadOnly(false); err != nil {
			return err
		}
	}
	return os.Remove(file)
}

func unused(claim *bpf.Claim) error {
	who, err := claim.Writers()
	if err == nil && len(who) > 0 {
		err = fmt.Errorf("it %w: open for writing in %s", bpf.ErrInUse, strings.Join(who, ", "))
	}
	return err
}

// closeForGood closes the current epoch and takes all that is retained.
func (v State) closeForGood(reg *bpf.Registration) (*savedState, error) {
	if _, err := reg.Swap(); err != nil {
		return nil, err
	}
	for _, e := range reg.Retained() {
		if why := judge(e); len(why) > 0 {
			return nil, fmt.Errorf("it is unknown what changed: %s", strings.Join(why, "; "))
		}
	}
	x, err := reg.Export()
	if err != nil {
		return nil, err
	}
	boot, err := v.boot()
	return &savedState{stateHeader{
		SavedAt: time.Now(), Boot: boot, Registration: x.ID, First: x.First, Last: x.Last, Shift: x.Shift, Size: x.Size, Table: x.Table,
		Opened: x.Opened, Closed: x.Closed, Missed: x.Missed, Sectors: x.Sectors, Landed: x.Landed, Kernel: x.Kernel, KernelCounts: x.KernelCounts,
	}, x.Bitmap}, err
}

// settled waits until a write would change the device's proof, if it has one.
func settled(dev bpf.Device) (bpf.Identity, error) {
	for end := time.Now().Add(settleLimit); ; time.Sleep(20 * time.Millisecond) {
		id, err := dev.Identity()
		if err != nil || id.Proof == "" || id.Settled {
			return id, err
		}
		if time.Now().After(end) {
			id.Proof = ""
			return id, nil
		}
	}
}

func (v State) write(id bpf.Identity, state *savedState) error {
	b, err := state.encode()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(v.Dir, 0o700); err != nil {
		return err
	}
	file := v.file(id)
	f, err := os.OpenFile(file+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(file+".new"))
	}
	if err := os.Rename(file+".new", file); err != nil {
		return err
	}
	return syncDir(v.Dir)
}

// remove makes sure that no state of the device is there, also after a power cut.
func (v State) remove(id bpf.Identity) error {
	err := os.Remove(v.file(id))
	if errors.Is(err, os.ErrNotExist) {
		// Perhaps a process that did not live to make it durable has removed it.
		if _, err := os.Stat(v.Dir); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	} else if err != nil {
		return fmt.Errorf("a saved state that must not be used: %w", err)
	}
	return syncDir(v.Dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Forget removes the saved state of a device, and makes it writable again if saving has made
// it read-only in this boot.
func (v State) Forget(path string) error {
	dev, err := bpf.Lookup(path)
	if errors.Is(err, bpf.ErrNotBlock) {
		return nil // image files are never saved
	}
	if err != nil {
		return err
	}
	_, _, err = v.take(dev)
	return err
}

// ForgetAll is Forget for all devices. States of those that are not there are removed too.
func (v State) ForgetAll() error {
	if v.Dir == "" {
		return nil
	}
	if _, err := os.Stat(v.Dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	all, err := bpf.Disks()
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range all {
		if id, err := d.Identity(); err == nil && v.knows(id) {
			_, _, err := v.take(d)
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err // what is left tells that a device is read-only
	}
	for _, pattern := range []string{"*.state", "*.state.new", "*.state.readonly"} {
		files, err := filepath.Glob(filepath.Join(v.Dir, pattern))
		if err != nil {
			return err
		}
		for _, f := range files {
			errs = append(errs, os.Remove(f))
		}
	}
	return errors.Join(append(errs, syncDir(v.Dir))...)
}

// knows tells whether there is a saved state of a device, or a note that it was made read-only.
func (v State) knows(id bpf.Identity) bool {
	for _, f := range []string{v.file(id), v.file(id) + ".readonly"} {
		if _, err := os.Lstat(f); err == nil {
			return true
		}
	}
	return false
}

// ErrSuspended is wrapped where the tracking of a device has been saved for the next boot.
var ErrSuspended = errors.New("its tracking has been saved (suspend), and nothing that is found out now would be kept with it")

// Audit takes hold of a device or image file for an audit, as it is tracked now. What is saved for the next boot would
// not know of a mismatch, so the error wraps ErrUnproven and ErrSuspended where something is.
func (v State) Audit(tracker *bpf.Tracker, path string) (*Tracked, error) {
	if dev, err := bpf.Lookup(path); err == nil && v.Dir != "" {
		if id, err := dev.Identity(); err == nil {
			if _, err := os.Stat(v.file(id)); err == nil {
				return nil, fmt.Errorf("%s: %w: %w", path, ErrUnproven, ErrSuspended)
			}
		}
	}
	return Adopt(tracker, path)
}

// empty tells whether no state of any device is kept, which is mostly so: to find out what the
// device is called takes a look at all others.
func (v State) empty() (bool, error) {
	if v.Dir == "" {
		return true, nil
	}
	all, err := os.ReadDir(v.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return true, nil
	}
	return len(all) == 0, err
}

// take removes the saved state of the device, and returns it if it is of an earlier boot and
// can be read; else it may say why not.
func (v State) take(dev bpf.Device) (*savedState, string, error) {
	if none, err := v.empty(); none || err != nil {
		return nil, "", err
	}
	id, err := dev.Identity()
	if errors.Is(err, bpf.ErrNoIdentity) {
		return nil, "", nil // nothing can have been saved under this name
	}
	if err != nil {
		return nil, "", err
	}
	b, err := os.ReadFile(v.file(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, "", v.letIn(id, dev)
	}
	if err != nil {
		return nil, "", fmt.Errorf("a saved state that must be removed: %w", err)
	}
	// Only when no state is left, others may write.
	if err := v.remove(id); err != nil {
		return nil, "", err
	}
	if err := v.letIn(id, dev); err != nil {
		return nil, "", err
	}
	state, err := decodeState(b)
	if err != nil {
		return nil, err.Error(), nil //nolint:nilerr // said in the next delta: all is unknown
	}
	boot, err := v.boot()
	if err != nil {
		return nil, "", err
	}
	if state.Boot == boot {
		return nil, "", nil // its epochs are in the kernel still
	}
	return state, "", nil
}

// usable says why a state can't be believed, or how it is.
func (v State) usable(state *savedState, dev bpf.Device) (bpf.Trust, error) {
	id, err := dev.Identity()
	if err != nil {
		return 0, err
	}
	boots, err := bootsSince(v.wtmp(), state.SavedAt)
	switch {
	case err != nil:
		return 0, err
	case boots > 1:
		return 0, fmt.Errorf("the host was started %d times since", boots)
	case id.Name != state.Device:
		return 0, errors.New("it is of another device")
	case dev.Size != state.Size:
		return 0, fmt.Errorf("the device had %d bytes and has %d", state.Size, dev.Size)
	case dev.Table != state.Table:
		return 0, errors.New("the device-mapper table is another one")
	}
	if state.Proof != "" {
		// It speaks of all systems and all time since.
		if id.Proof != state.Proof {
			return 0, fmt.Errorf("the device was written to since: %s when saved, now %s", state.Proof, id.Proof)
		}
		return bpf.SavedProven, nil
	}
	if !dev.Untouched() {
		return 0, errors.New("the kernel's statistics don't show that nobody wrote since the device appeared")
	}
	if !v.Trust {
		return 0, errors.New("nothing proves that no other system wrote to the device meanwhile (--trust-saved-state takes it for granted)")
	}
	return bpf.SavedTrusted, nil
}

func (v State) wtmp() string {
	if v.Wtmp != "" {
		return v.Wtmp
	}
	return "/var/log/wtmp"
}

// resume goes on with a saved state, or says why it can't be believed.
func (v State) resume(tracker *bpf.Tracker, dev bpf.Device, state *savedState) (*bpf.Registration, error) {
	trust, err := v.usable(state, dev)
	if err != nil {
		return nil, err
	}
	reg, err := tracker.Restore(dev, bpf.Saved{
		ID: state.Registration, First: state.First, Last: state.Last, Shift: state.Shift, Size: state.Size, Table: state.Table,
		Opened: state.Opened, Closed: state.Closed, Missed: state.Missed, Sectors: state.Sectors, Landed: state.Landed, Kernel: state.Kernel,
		KernelCounts: state.KernelCounts, Boot: state.Boot, Trust: trust, Bitmap: state.bitmap,
	})
	if err != nil {
		return nil, err
	}
	// From here on writes are seen. Those before, since the first look, would show now.
	if _, err := v.usable(state, dev); err != nil {
		return nil, errors.Join(err, reg.Unregister())
	}
	return reg, nil
}

// Devices are the paths of the devices of this host that have a saved state.
func (v State) Devices() ([]string, error) {
	all, err := bpf.Disks()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, d := range all {
		id, err := d.Identity()
		if err != nil {
			continue
		}
		if _, err := os.Stat(v.file(id)); err == nil {
			out = append(out, d.Path)
		}
	}
	return out, nil
}
