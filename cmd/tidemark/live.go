package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
)

// liveOptions are those of export --live.
type liveOptions struct {
	device, since, commit string
	commitOnDisconnect    bool
}

func (o *liveOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.device, "live", "", "a block device instead of a point: it is read while it is written")
	f.StringVar(&o.since, "since", "", "with --live: the change ID that the last pull was given; what changed since is qemu:dirty-bitmap:ID")
	f.BoolVar(&o.commitOnDisconnect, "commit-on-disconnect", false, "with --live: end when a client has read all that changed and has left, and forget what changed before")
	f.StringVar(&o.commit, "commit", "", "with --live: serve nothing, forget what changed up to this change ID")
}

// given tells whether any flag needs --live.
func (o *liveOptions) given() bool { return o.since != "" || o.commit != "" || o.commitOnDisconnect }

// liveBegin is printed when a device is served.
type liveBegin struct {
	Device   string   `json:"device"`
	URI      string   `json:"uri"`
	Size     int64    `json:"size"`
	Since    string   `json:"since,omitempty"`
	Context  string   `json:"context,omitempty"` // of what changed since
	ChangeID string   `json:"change_id"`         // for the next pull
	Changed  int64    `json:"changed_bytes"`
	Unknown  []string `json:"unknown,omitempty"` // why all counts as changed
}

// liveEnd is printed when that has ended.
type liveEnd struct {
	ChangeID  string `json:"change_id"`
	Unread    int64  `json:"unread_bytes"` // of what changed
	Meanwhile int64  `json:"written_meanwhile_bytes"`
	Instant   bool   `json:"instant"` // what was read shows one
	Committed bool   `json:"committed"`
}

// tracking opens the tracking of a device for one step. It is not held while clients read: backups
// of the same disk go on.
func (g *globals) tracking(device string) (*tracked, error) {
	s, err := g.sources("64KiB")
	if err != nil {
		return nil, err
	}
	return s.track(device)
}

// runLive serves a device, with what changed on it.
func (o exportOptions) runLive(c *cobra.Command, g *globals) (err error) {
	if o.live.commit != "" {
		return o.live.commitNow(c, g)
	}
	since, err := cbt.ParseChangeID(o.live.since)
	if err != nil {
		return usageError{fmt.Errorf("export: --since: %w", err)}
	}
	if err := o.check("export"); err != nil {
		return err
	}
	disk, err := restore.OpenLive(o.live.device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	delta, err := g.changes(c.Context(), disk, o.live.device, since)
	if err != nil {
		return err
	}
	disk.SetChanged(spans(delta.Extents))

	e := nbd.Export{Description: o.live.device + ", live", Disk: disk, ReadOnly: true}
	begin := liveBegin{Device: o.live.device, Size: disk.Size(), Since: o.live.since, ChangeID: delta.ID.String(), Changed: disk.Changed()}
	if o.live.since != "" {
		e.History = nbd.Since{Name: o.live.since, Disk: disk.Base()}
		begin.Context, begin.Unknown = "qemu:dirty-bitmap:"+o.live.since, delta.Unknown
	}
	set, err := nbd.NewStatic(e)
	if err != nil {
		return err
	}
	ctx, done := context.WithCancel(c.Context())
	defer done()
	srv, err := o.server(&leaving{Exports: set, left: func() {
		if o.live.commitOnDisconnect && disk.Unread() == 0 {
			done()
		}
	}})
	if err != nil {
		return err
	}
	l, where, err := o.bind(ctx, "")
	if err != nil {
		return err
	}
	begin.URI = where
	if err := begin.print(c.OutOrStdout(), g); err != nil {
		return errors.Join(err, l.Close())
	}
	o.warnOpen(c, g, l)
	if err := srv.Serve(ctx, l); err != nil {
		return err
	}
	return o.live.end(c, g, disk, delta.ID)
}

// changes closes the epoch, and checks that what is served is what is tracked.
func (g *globals) changes(ctx context.Context, disk *restore.Live, device string, since cbt.ChangeID) (_ cbt.Delta, err error) {
	src, err := g.tracking(device)
	if err != nil {
		return cbt.Delta{}, err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	if err := disk.Sync(); err != nil { // what is only in the page cache was not seen yet
		return cbt.Delta{}, err
	}
	delta, err := src.Changes(ctx, since)
	if err != nil {
		return cbt.Delta{}, err
	}
	if err := agent.SameDisk(disk.File(), disk.Size(), delta.Evidence); err != nil {
		return cbt.Delta{}, fmt.Errorf("%s: %w: %w", device, cbt.ErrDeviceChanged, err)
	}
	return delta, nil
}

func spans(x cbt.Extents) []restore.Span {
	list := make([]restore.Span, 0, len(x))
	for _, e := range x {
		list = append(list, restore.Span{Off: e.Off, Len: e.Len})
	}
	return list
}

func (b liveBegin) print(w io.Writer, g *globals) error {
	switch {
	case g.json:
		return printJSON(w, b)
	case g.quiet:
		_, err := fmt.Fprintln(w, b.ChangeID) // without it the next pull would be a full one
		return err
	}
	_, err := fmt.Fprintf(w, "%s at %s, read while it is written\n", b.Device, b.URI)
	if b.Context != "" && err == nil {
		_, err = fmt.Fprintf(w, "  %s changed of %s: %s\n", size(b.Changed), size(b.Size), b.Context)
	}
	for _, why := range b.Unknown {
		if err == nil {
			_, err = fmt.Fprintf(w, "  everything counts as changed: %s\n", why)
		}
	}
	if err == nil {
		_, err = fmt.Fprintf(w, "  next time: --since %s\n", b.ChangeID)
	}
	return err
}

// end tells what was written meanwhile, and commits if that was asked for and all was read.
func (o *liveOptions) end(c *cobra.Command, g *globals, disk *restore.Live, id cbt.ChangeID) (err error) {
	// The client has what it has read, whatever ended this.
	ctx := context.WithoutCancel(c.Context())
	r := liveEnd{ChangeID: id.String(), Unread: disk.Unread()}
	later, err := g.changes(ctx, disk, o.device, id)
	if err != nil {
		return fmt.Errorf("what was written meanwhile can't be told: %w", err)
	}
	r.Meanwhile = later.Extents.Bytes()
	r.Instant = r.Unread == 0 && r.Meanwhile == 0 && len(later.Unknown) == 0
	if o.commitOnDisconnect {
		if r.Unread > 0 {
			err = fmt.Errorf("%s of what changed were not read: nothing is forgotten, pull again with the same --since", size(r.Unread))
		} else {
			err = g.commit(o.device, id)
			r.Committed = err == nil
		}
	}
	if g.json {
		return errors.Join(err, printJSON(c.OutOrStdout(), r))
	}
	if g.quiet {
		return err
	}
	w := c.OutOrStdout()
	if r.Unread > 0 && !o.commitOnDisconnect {
		_, _ = fmt.Fprintf(w, "  %s of what changed were not read: the next pull needs the same --since as this one\n", size(r.Unread))
	}
	switch {
	case r.Instant:
		_, _ = fmt.Fprintln(w, "  nothing was written meanwhile: what was read shows one instant")
	case r.Meanwhile > 0:
		_, _ = fmt.Fprintf(w, "  %s were written meanwhile: what was read shows no single instant; the next pull brings them\n", size(r.Meanwhile))
	}
	if r.Committed {
		_, _ = fmt.Fprintf(w, "  what changed up to %s is forgotten\n", r.ChangeID)
	}
	return err
}

// commit drops what is kept of changes up to id.
func (g *globals) commit(device string, id cbt.ChangeID) (err error) {
	src, err := g.tracking(device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	return src.Commit(id)
}

func (o *liveOptions) commitNow(c *cobra.Command, g *globals) error {
	id, err := cbt.ParseChangeID(o.commit)
	if err != nil || id.IsZero() || o.since != "" || o.commitOnDisconnect {
		return usageError{errors.Join(errors.New("export: --commit takes a change ID, and no other flag but --live"), err)}
	}
	if _, err := os.Stat(o.device); err != nil {
		return err
	}
	if err := g.commit(o.device, id); err != nil {
		return err
	}
	return g.say(c, map[string]string{"committed": id.String()}, "%s: what changed up to %s is forgotten", o.device, id)
}

// leaving tells when the last of those that use the exports has left.
type leaving struct {
	nbd.Exports
	left func()

	mu sync.Mutex
	n  int
}

// Open implements nbd.Exports.
func (u *leaving) Open(ctx context.Context, client nbd.Client, name string) (nbd.Export, error) {
	e, err := u.Exports.Open(ctx, client, name)
	if err != nil {
		return e, err
	}
	u.mu.Lock()
	u.n++
	u.mu.Unlock()
	release := e.Release
	e.Release = func() {
		if release != nil {
			release()
		}
		u.mu.Lock()
		u.n--
		last := u.n == 0
		u.mu.Unlock()
		if last {
			u.left()
		}
	}
	return e, nil
}
