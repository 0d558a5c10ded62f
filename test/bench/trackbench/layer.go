package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/tidemark/tidemark/bpf"
)

// A layer stands between fio and the device, or watches.
type layer struct {
	name string
	what string
	side bool // needs the device beside
	dm   bool // needs device-mapper
	// put lays it over d and returns the path to write to.
	put func(ctx context.Context, b *bench, d *device) (*laid, error)
}

// laid is a layer in place.
type laid struct {
	path    string
	tracker *bpf.Tracker
	// check finds out, after the writes, whether it did its work all the time.
	check  func(ctx context.Context) error
	remove func(ctx context.Context) error
}

// granule is what one bit, era block or chunk stands for in every layer, in bytes.
const granule = 1 << bpf.DefaultGranuleShift

var layers = []layer{
	{name: "none", what: "no tracker is attached", put: func(_ context.Context, _ *bench, d *device) (*laid, error) { return &laid{path: d.path}, nil }},
	{name: "attached", what: "a tracker is attached, this device is not registered", put: putAttached},
	{name: "tracked", what: "this device is registered", put: putTracked},
	{name: "linear", what: "dm-linear: what device-mapper alone costs", dm: true, put: putLinear},
	{name: "era", what: "dm-era, new metadata each time", dm: true, side: true, put: putEra},
	{name: "snapshot", what: "dm-snapshot-origin with one empty persistent snapshot each time", dm: true, side: true, put: putSnapshot},
}

func chooseLayers(names string) ([]layer, error) {
	var out []layer
	for name := range strings.SplitSeq(names, ",") {
		i := len(out)
		for _, l := range layers {
			if l.name == name {
				out = append(out, l)
			}
		}
		if len(out) == i {
			return nil, fmt.Errorf("unknown layer %q", name)
		}
	}
	if out[0].name != "none" {
		return nil, errors.New("the first layer must be none: the others are compared with it")
	}
	return out, nil
}

func putAttached(_ context.Context, b *bench, d *device) (*laid, error) {
	t, err := bpf.Open(bpf.Options{Dir: b.pins})
	if err != nil {
		return nil, err
	}
	l := &laid{path: d.path, tracker: t}
	l.remove = func(context.Context) error { return errors.Join(t.Close(), bpf.Remove(b.pins)) }
	return l, nil
}

func putTracked(ctx context.Context, b *bench, d *device) (*laid, error) {
	l, err := putAttached(ctx, b, d)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*laid, error) { return nil, errors.Join(err, l.remove(ctx)) }
	dev, err := bpf.Lookup(d.path)
	if err != nil {
		return fail(err)
	}
	r, err := l.tracker.Register(dev, bpf.DefaultGranuleShift)
	if err != nil {
		return fail(err)
	}
	detach := l.remove
	l.remove = func(ctx context.Context) error { return errors.Join(r.Close(), detach(ctx)) }
	l.check = func(context.Context) error {
		e, err := r.Swap()
		if err != nil {
			return err
		}
		if e.Dirty() == 0 {
			return errors.New("the tracker saw nothing")
		}
		if why := append(e.Taint().Reasons(), e.Loss().Reasons()...); len(why) > 0 {
			b.note("%s: an epoch could not be proven complete: %s", d.name, strings.Join(why, "; "))
		}
		return nil
	}
	return l, nil
}

// dmsetup runs without udev, which may not be there and is not needed.
func dmsetup(ctx context.Context, args ...string) (string, error) {
	c := exec.CommandContext(ctx, "dmsetup", args...)
	c.Env = append(os.Environ(), "DM_DISABLE_UDEV=1")
	out, err := c.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("dmsetup %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), err
}

// mapper makes device-mapper devices, the first one first.
func mapper(ctx context.Context, tables ...[2]string) (*laid, error) {
	l := &laid{}
	var made []string
	l.remove = func(ctx context.Context) error {
		var err error
		for i := len(made) - 1; i >= 0; i-- {
			_, e := dmsetup(ctx, "remove", "--retry", made[i])
			err = errors.Join(err, e)
		}
		return err
	}
	for _, t := range tables {
		name := fmt.Sprintf("tidemark-bench-%d-%s", os.Getpid(), t[0])
		if _, err := dmsetup(ctx, "create", name, "--table", t[1]); err != nil {
			return nil, errors.Join(err, l.remove(ctx))
		}
		made = append(made, name)
		l.path = filepath.Join("/dev/mapper", name)
	}
	return l, nil
}

func putLinear(ctx context.Context, _ *bench, d *device) (*laid, error) {
	return mapper(ctx, [2]string{"linear", fmt.Sprintf("0 %d linear %s 0", d.bytes/512, d.path)})
}

func putEra(ctx context.Context, _ *bench, d *device) (*laid, error) {
	if err := wipe(d.side); err != nil {
		return nil, err
	}
	return mapper(ctx, [2]string{"era", fmt.Sprintf("0 %d era %s %s %d", d.bytes/512, d.side, d.path, granule/512)})
}

// putSnapshot makes the snapshot first: the origin asks it for its chunk size.
func putSnapshot(ctx context.Context, _ *bench, d *device) (*laid, error) {
	if err := wipe(d.side); err != nil {
		return nil, err
	}
	l, err := mapper(ctx,
		[2]string{"snapshot", fmt.Sprintf("0 %d snapshot %s %s P %d", d.bytes/512, d.path, d.side, granule/512)},
		[2]string{"origin", fmt.Sprintf("0 %d snapshot-origin %s", d.bytes/512, d.path)})
	if err != nil {
		return nil, err
	}
	l.check = func(ctx context.Context) error {
		out, err := dmsetup(ctx, "status", strings.TrimSuffix(filepath.Base(l.path), "origin")+"snapshot")
		if err != nil {
			return err
		}
		used, err := parseSnapshotStatus(out)
		if err == nil && used == 0 {
			err = errors.New("the snapshot copied nothing")
		}
		return err
	}
	return l, nil
}

// parseSnapshotStatus returns the sectors in use. A snapshot that has run full does
// nothing any more, and is an error (Linux, device-mapper/snapshot.rst).
func parseSnapshotStatus(status string) (int64, error) {
	f := strings.Fields(status) // START LENGTH snapshot USED/TOTAL METADATA
	if len(f) < 4 || f[2] != "snapshot" {
		return 0, fmt.Errorf("no status of a snapshot: %q", status)
	}
	used, _, ok := strings.Cut(f[3], "/")
	n, err := strconv.ParseInt(used, 10, 64)
	if !ok || err != nil {
		return 0, fmt.Errorf("the snapshot does not work any more: %s", strings.Join(f[3:], " "))
	}
	return n, nil
}
