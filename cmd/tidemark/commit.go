package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
)

func newCommit(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "commit OVERLAY... -r REPO",
		Short: "Make a restore point of what a booted VM wrote",
		Long: `Make a restore point of the overlays of a VM that was booted from one ("tidemark boot", or "export --writable"):
its disks as they are now, at the cost of what was written. The overlays stay as they are.

Give the overlays of all disks that were written to; a disk without one stays as it was. One that was made
with them (OVERLAY.diskN) can't be left out. The VM must not
run. The new point's parent is the one that was booted. It is the VM's newest; the next backup of
the VM's own disks compares them with it.`,
		Example: `  tidemark boot web1@latest -r /srv/backup --overlay web1.overlay
  tidemark commit web1.overlay -r /srv/backup
  tidemark restore web1@latest -r /srv/backup -o web1.raw`,
		Args: args(1, -1),
		RunE: func(c *cobra.Command, a []string) error { return commitOverlays(c, g, a) },
	}
}

func commitOverlays(c *cobra.Command, g *globals, files []string) (err error) {
	ctx, begin := c.Context(), time.Now()
	cat, repo, err := g.catalog(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	first, err := restore.ReadOverlayBase(files[0])
	if err != nil {
		return err
	}
	if first.Repository != cat.ID() {
		return fmt.Errorf("%s: %w: it was made over a point of repository %s, this one is %s", files[0], restore.ErrOverlayBase, first.Repository, cat.ID())
	}
	p, err := cat.Find(ctx, first.VM+"@"+first.Point)
	if err != nil {
		return fmt.Errorf("the point that %s was made over: %w", files[0], err)
	}
	overlays := map[int]*restore.Overlay{}
	var closers []func() error
	defer func() {
		for _, f := range closers {
			err = errors.Join(err, f())
		}
	}()
	var last time.Time
	for _, f := range files {
		base, err := restore.ReadOverlayBase(f)
		if err != nil {
			return err
		}
		if base.Repository != first.Repository || base.VM != first.VM || base.Point != first.Point || overlays[base.Disk] != nil || base.Disk >= len(p.Disks) {
			return usageError{fmt.Errorf("commit: %s is of disk %d of %s@%s: give overlays of one point, one for each disk", f, base.Disk, base.VM, base.Point)}
		}
		st, err := os.Stat(f)
		if err != nil {
			return err
		}
		if st.ModTime().After(last) {
			last = st.ModTime()
		}
		ov, closeAll, err := openForCommit(ctx, cat, p, base.Disk, f)
		if err != nil {
			return err
		}
		closers = append(closers, closeAll)
		overlays[base.Disk] = ov
	}
	if err := leftOut(p, files, overlays); err != nil {
		return err
	}
	if last.After(begin) { // later points would come after it
		last = begin
	}
	bar := g.progress()
	made, err := cat.Commit(ctx, p, overlays, restore.CommitOptions{
		Time: last, Tool: toolName(), Progress: func(done, total int64) { bar.bytes("committing", done, total) },
	})
	bar.end()
	if err != nil {
		return err
	}
	s := agent.Sum(made)
	return g.say(c, map[string]*store.Point{"point": made}, "%s@%s  from %s: changed %s, read %s, stored %s  (%s, took %s)",
		made.VM, made.ID, made.Parent, size(s.Changed), size(s.Read), size(s.Stored), made.Consistency, short(time.Since(begin)))
}

// leftOut tells of an overlay that was made together with those given: without it the point would show
// two moments.
func leftOut(p *restore.PointDetails, files []string, given map[int]*restore.Overlay) error {
	for _, f := range files {
		for i, d := range p.Disks {
			if given[i] != nil {
				continue
			}
			other := strings.TrimSuffix(f, filepath.Ext(f)) + "." + d.Name
			if base, err := restore.ReadOverlayBase(other); err == nil && base.Point == p.ID && base.Disk == i {
				return usageError{fmt.Errorf("commit: %s is the overlay of %s: give it too, or the point would show disks of two moments", other, d.Name)}
			}
		}
	}
	return nil
}

// openForCommit opens an overlay over its disk.
func openForCommit(ctx context.Context, cat *restore.Catalog, p *restore.PointDetails, disk int, file string) (*restore.Overlay, func() error, error) {
	d, closer, err := cat.Open(ctx, p, disk)
	if err != nil {
		return nil, nil, err
	}
	ov, err := restore.OpenOverlay(file, d, cat.Identity(p, disk))
	if errors.Is(err, restore.ErrOverlayBusy) {
		err = fmt.Errorf("%w: stop the VM first", err)
	}
	if err != nil {
		return nil, nil, errors.Join(err, closer.Close())
	}
	return ov, func() error { return errors.Join(ov.Close(), closer.Close()) }, nil
}
