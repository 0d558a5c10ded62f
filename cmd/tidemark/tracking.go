package main

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// sources opens changed-block sources.
type sources struct {
	pins  string
	shift uint
	state cbt.State
}

// tracked is a source that owns the tracker it was opened with: another process may
// have replaced it by the time the next source is opened.
type tracked struct {
	*cbt.Tracked
	tracker *bpf.Tracker
}

func (t tracked) Close() error { return errors.Join(t.Tracked.Close(), t.tracker.Close()) }

func (g *globals) sources(granule string) (sources, error) {
	shift, err := granuleShift(granule)
	return sources{pins: g.pins, shift: shift, state: cbt.State{Dir: g.state}}, err
}

func granuleShift(s string) (uint, error) {
	n, err := humanize.ParseBytes(s)
	if err != nil || bits.OnesCount64(n) != 1 || n < 1<<bpf.MinGranuleShift || n > 1<<bpf.MaxGranuleShift {
		return 0, usageError{fmt.Errorf("--granule %q: must be a power of two from 4KiB to 1MiB", s)}
	}
	return uint(bits.TrailingZeros64(n)), nil
}

// open is what package agent calls.
func (s sources) open(_ context.Context, path string) (cbt.Source, error) {
	if isFile(path) {
		return s.image(path)
	}
	t, err := s.track(path)
	if err != nil {
		return nil, err // not t: an interface that holds a nil would not be nil
	}
	return t, nil
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// track tracks a device or an image file, or says why it can't be.
func (s sources) track(path string) (*tracked, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	if isFile(path) {
		if err := rawImage(path); err != nil {
			return nil, err
		}
		return s.trackFile(path)
	}
	// Nothing is attached for a device that can't be tracked.
	if _, err := bpf.Lookup(path); err != nil {
		return nil, err
	}
	return s.attach(path)
}

func (s sources) attach(path string) (*tracked, error) {
	t, err := s.attachOnce(path)
	if errors.Is(err, bpf.ErrDetached) {
		// Another process upgraded the tracker between two steps of this one.
		t, err = s.attachOnce(path)
	}
	return t, err
}

func (s sources) attachOnce(path string) (*tracked, error) {
	tracker, err := bpf.Open(bpf.Options{Dir: s.pins})
	if err != nil {
		return nil, err
	}
	t, err := s.state.Open(tracker, path, s.shift)
	if err != nil {
		return nil, errors.Join(err, tracker.Close())
	}
	return &tracked{t, tracker}, nil
}

// adopt is what package agent calls for audits: it takes what is tracked as it is.
func (s sources) adopt(_ context.Context, path string) (cbt.Auditor, error) {
	tracker, err := bpf.Open(bpf.Options{Dir: s.pins, AdoptOnly: true})
	if errors.Is(err, bpf.ErrNotAttached) {
		err = fmt.Errorf("%s: %w: %w", path, cbt.ErrUnproven, err)
	}
	if err != nil {
		return nil, err
	}
	t, err := s.state.Audit(tracker, path)
	if err != nil {
		return nil, errors.Join(err, tracker.Close())
	}
	return &tracked{t, tracker}, nil
}

// check finds out whether writes can be tracked here at all.
func (s sources) check() error {
	tracker, err := bpf.Open(bpf.Options{Dir: s.pins})
	if err != nil {
		return err
	}
	return tracker.Close()
}

func newTrack(g *globals) *cobra.Command {
	var granule string
	var trust, saved bool
	c := &cobra.Command{
		Use:   "track DEV|FILE... | --saved",
		Short: "Start tracking the writes to block devices and image files",
		Long: `Start tracking the writes to block devices, and to raw image files where the kernel
can do that (see doctor). Tracking goes on in the kernel until
untrack or reboot (see suspend for that), whether or not a tidemark process runs, and whether
or not a VM uses the disk.`,
		Example: "  tidemark track /dev/loop0\n  tidemark track /dev/vg0/web1 /dev/vg0/web1-data --granule 16KiB",
		Args:    args(0, -1),
		RunE: func(c *cobra.Command, devs []string) error {
			if saved != (len(devs) == 0) {
				return usageError{errors.New("track: give devices, or --saved")}
			}
			s, err := g.sources(granule)
			if err != nil {
				return err
			}
			s.state.Trust = trust
			if saved {
				if devs, err = s.state.Devices(); err != nil {
					return err
				}
			}
			var errs []error
			for _, dev := range devs {
				t, err := s.track(dev)
				if err != nil {
					errs = append(errs, err) // the others can be tracked still
					continue
				}
				if !g.quiet {
					what := "was tracked already"
					switch {
					case t.Resumed():
						what = "is tracked again, and was not written to meanwhile"
					case len(t.Began()) > 0:
						what = "is tracked from now on"
					}
					_, _ = fmt.Fprintf(c.OutOrStdout(), "%s %s, granule %s\n", dev, what, size(t.Granule()))
					if why := t.tracker.Outdated(); why != "" {
						_, _ = fmt.Fprintf(c.OutOrStdout(), "  %s\n", why)
					}
				}
				errs = append(errs, t.Close())
			}
			return errors.Join(errs...)
		},
	}
	c.Flags().StringVar(&granule, "granule", "64KiB", "what one bit stands for, 4KiB to 1MiB")
	c.Flags().BoolVar(&saved, "saved", false, "all devices whose tracking was saved before the last start")
	trustFlag(c, &trust)
	return c
}

func newUntrack(g *globals) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "untrack DEV|FILE... | --all",
		Short: "Stop tracking; the next backup compares the whole disk",
		Long: `Stop tracking: the next backup compares the whole disk. What suspend has saved is forgotten too,
and devices that it has made read-only can be written to again.`,
		Example: `  tidemark untrack /dev/loop0
  tidemark untrack --all      # detaches the programs too`,
		Args: args(0, -1),
		RunE: func(c *cobra.Command, devs []string) (err error) {
			if all != (len(devs) == 0) {
				return usageError{errors.New("untrack: give devices, or --all")}
			}
			state := cbt.State{Dir: g.state}
			if all {
				if err := bpf.Remove(g.pins); err != nil {
					return err
				}
				// After it: until here, what is saved goes on with what is tracked.
				return state.ForgetAll()
			}
			tr, err := bpf.Open(bpf.Options{Dir: g.pins, AdoptOnly: true})
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, tr.Close()) }()
			for _, path := range devs {
				dev, err := bpf.LookupTarget(path)
				if err != nil {
					return err
				}
				if err := state.Forget(path); err != nil {
					return err
				}
				if err := tr.Forget(dev); err != nil {
					return err
				}
				if !g.quiet {
					_, _ = fmt.Fprintf(c.OutOrStdout(), "%s is not tracked any more\n", path)
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&all, "all", false, "all devices, and detach the tracker")
	return c
}

// trackedDevice is a row of status.
type trackedDevice struct {
	Device   string   `json:"device"`
	Number   string   `json:"number"`
	Size     int64    `json:"size"`
	Granule  int64    `json:"granule"`
	Epoch    uint64   `json:"epoch"`
	Since    string   `json:"since"`
	Dirty    int64    `json:"dirty_bytes"`
	Retained int      `json:"retained_epochs"`
	Memory   int64    `json:"bitmap_bytes"`
	Writes   uint64   `json:"writes"`
	Bytes    uint64   `json:"written_bytes"`
	Discards uint64   `json:"discards"`
	Rewrites uint64   `json:"rewrites"`
	Unknown  []string `json:"unknown,omitempty"`
}

// trackerStatus is what status tells.
type trackerStatus struct {
	Tracked []trackedDevice `json:"tracked"`
	Notes   []string        `json:"notes,omitempty"` // on the tracker itself
}

// statusOf looks at the tracker that is pinned. What could be read is returned in any case.
func statusOf(pins string) (st trackerStatus, err error) {
	st.Tracked = []trackedDevice{}
	tr, err := bpf.Open(bpf.Options{Dir: pins, AdoptOnly: true})
	switch {
	case errors.Is(err, bpf.ErrUnusable):
		st.Notes = []string{message(err)}
		return st, nil
	case errors.Is(err, bpf.ErrNotAttached):
		return st, nil
	case err != nil:
		return st, err
	}
	defer func() { err = errors.Join(err, tr.Close()) }()
	for _, note := range []string{tr.Grown(), tr.Outdated()} {
		if note != "" {
			st.Notes = append(st.Notes, note)
		}
	}
	all, err := tr.Status()
	for _, s := range all {
		st.Tracked = append(st.Tracked, trackedRow(s))
	}
	return st, err
}

func newStatus(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "List the tracked devices and image files",
		Long: `List the tracked devices and image files, and say what has to be known of the tracker itself.
With --json: an object of "tracked" and "notes".`,
		Example: "  tidemark status\n  tidemark status --json | jq '.tracked[].device'",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			st, problem := statusOf(g.pins)
			if g.json {
				return errors.Join(printJSON(c.OutOrStdout(), st), problem)
			}
			rows := st.Tracked
			t := newTable(c.OutOrStdout(), "DEVICE", "SIZE", "GRANULE", "EPOCH", "CHANGED", "WRITES", "WRITTEN", "MEMORY", "SINCE", "STATE")
			for _, r := range rows {
				state := "ok"
				if len(r.Unknown) > 0 {
					state = "unknown: " + strings.Join(r.Unknown, "; ")
				}
				t.row(r.Device, size(r.Size), size(r.Granule), fmt.Sprint(r.Epoch), size(r.Dirty), fmt.Sprint(r.Writes),
					size(int64(r.Bytes)), size(r.Memory), r.Since, state)
			}
			var err error
			switch {
			case len(rows) > 0:
				err = t.flush()
			case len(st.Notes) == 0 && problem == nil:
				_, err = fmt.Fprintln(c.OutOrStdout(), "nothing is tracked")
			}
			for _, note := range st.Notes {
				if err == nil {
					_, err = fmt.Fprintln(c.OutOrStdout(), note)
				}
			}
			return errors.Join(err, problem)
		},
	}
}

func trackedRow(s bpf.Status) trackedDevice {
	name := "(gone)"
	switch {
	case s.Image:
		name = s.Name
	case s.Name != "":
		name = "/dev/" + s.Name
	}
	number := fmt.Sprintf("%d:%d", s.Major, s.Minor)
	if s.Image {
		number += fmt.Sprintf("/%d", s.Inode)
	}
	return trackedDevice{
		Device: name, Number: number, Size: s.Size, Granule: s.Granule, Epoch: s.Epoch,
		Since: clock(s.Since), Dirty: int64(s.Dirty) * s.Granule, Retained: s.Retained, Memory: s.BitmapBytes,
		Writes: s.Counts.Submits, Bytes: s.Counts.SubmitSectors * 512, Discards: s.Counts.Discards, Rewrites: s.Counts.Rewrites,
		Unknown: append(s.Taint.Reasons(), s.Loss.Reasons()...),
	}
}
