package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/fusefs"
	"github.com/tidemark/tidemark/guestfs"
	"github.com/tidemark/tidemark/guestfs/appliance"
	"github.com/tidemark/tidemark/restore"
)

// mountedEnv tells a background process which pipe to report to.
const mountedEnv = "TIDEMARK_MOUNTED_FD"

func newMount(g *globals) *cobra.Command {
	var o fusefs.Options
	var daemon, noFiles bool
	var guest appliance.Config
	c := &cobra.Command{
		Use:   "mount DIR -r REPO",
		Short: "Show every restore point as files",
		Long: `Show every restore point of every VM as files, read-only:

  DIR/NAME/latest                    link to the newest that is not known to be damaged
  DIR/NAME/2026-11-22T18-30-00Z/     a point:
    disk0.raw                        the disk
    disk0.parts/p1.raw               a partition of it (GPT and MBR)
    disk0.parts/partitions.json      where the partitions lie, and what is wrong with the table
    disk0.files/p1/                  the guest's own files on a partition, as after a recovery
    changes-since-previous.json      extents that differ from the point before
    point.json                       what is known of the point

A plain user may mount too, with fusermount3 of the package fuse3. New points appear by themselves, and
deleted ones vanish. Works in the foreground until interrupted or unmounted;
--daemon returns when the files are there.`,
		Example: `  tidemark mount /mnt/points -r /srv/backup --daemon
  mount -o loop,ro,noload /mnt/points/web1/latest/disk0.parts/p1.raw /mnt/disk
  jq .disks[].changed /mnt/points/web1/latest/changes-since-previous.json
  fusermount3 -u /mnt/points`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			if daemon && os.Getenv(mountedEnv) == "" {
				return mountInBackground(c.Context())
			}
			cat, repo, err := g.catalog(c.Context())
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, repo.Close()) }()
			o.Failed = func(path string, err error) { slog.Warn("cannot be read", "path", path, "error", clean(err)) }
			if !noFiles {
				pool := appliance.NewPool(guest)
				defer func() { err = errors.Join(err, pool.Close()) }()
				o.Files = guestFiles(cat, pool)
			}
			srv, err := fusefs.Mount(c.Context(), a[0], cat, o)
			if err != nil {
				return err
			}
			if err := reportMounted(); err != nil {
				return errors.Join(err, srv.Unmount())
			}
			if !g.quiet && os.Getenv(mountedEnv) == "" {
				_, _ = fmt.Fprintf(c.OutOrStdout(), "mounted at %s; interrupt or `fusermount3 -u %s` ends it\n", a[0], a[0])
			}
			return serveMount(c.Context(), srv)
		},
	}
	c.Flags().BoolVar(&o.AllowOther, "allow-other", false, "let other users read it (needs user_allow_other in /etc/fuse.conf unless root)")
	c.Flags().BoolVar(&daemon, "daemon", false, "go to the background when mounted")
	c.Flags().BoolVar(&noFiles, "no-files", false, "don't show disk0.files")
	applianceFlags(c, &guest)
	return c
}

// applianceFlags are those of commands that read guests' own files.
func applianceFlags(c *cobra.Command, o *appliance.Config) {
	c.Flags().StringVar(&o.Kernel, "appliance-kernel", os.Getenv("TIDEMARK_APPLIANCE_KERNEL"),
		"kernel that reads guests' file systems, VMLINUZ[:MODULESDIR] (default $TIDEMARK_APPLIANCE_KERNEL, or the newest in /boot)")
}

// guestFiles gives the files in points' disks, read by appliances.
func guestFiles(cat *restore.Catalog, pool *appliance.Pool) func(*restore.PointDetails, int) guestfs.Files {
	return func(p *restore.PointDetails, disk int) guestfs.Files {
		return pool.Disk(cat.Identity(p, disk), func(ctx context.Context) (restore.Disk, io.Closer, error) {
			return cat.Open(ctx, p, disk)
		})
	}
}

// serveMount waits until the mount ends, by itself or by a signal.
func serveMount(ctx context.Context, srv *fusefs.Server) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Wait()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	for {
		err := srv.Unmount()
		if err == nil {
			<-done
			return nil
		}
		// Somebody has a file open: say so, and leave when they do.
		fmt.Fprintln(os.Stderr, "tidemark: "+err.Error()+": waiting for it to be let go")
		select {
		case <-done:
			return nil
		case <-time.After(2 * time.Second):
		}
	}
}

// mountInBackground runs the same command in a session of its own, which
// mountedEnv tells to stay in the foreground, and returns when it has mounted.
func mountInBackground(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	errFile, err := os.CreateTemp("", "tidemark-mount-")
	if err != nil {
		return err
	}
	defer func() { _ = errFile.Close(); _ = os.Remove(errFile.Name()) }()
	child := exec.CommandContext(context.WithoutCancel(ctx), self, os.Args[1:]...)
	child.Env = append(os.Environ(), mountedEnv+"=3")
	child.ExtraFiles = []*os.File{w}
	child.Stderr = errFile
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		return fmt.Errorf("start the mount: %w", err)
	}
	_ = w.Close()
	stop := context.AfterFunc(ctx, func() { _ = r.Close() })
	defer stop()
	if n, _ := r.Read(make([]byte, 1)); n == 1 {
		return child.Process.Release()
	}
	_ = child.Process.Signal(syscall.SIGTERM)
	_ = child.Wait()
	why, _ := os.ReadFile(errFile.Name())
	return fmt.Errorf("mount in the background: %s", why)
}

// reportMounted tells the foreground process, if there is one.
func reportMounted() error {
	if os.Getenv(mountedEnv) == "" {
		return nil
	}
	f := os.NewFile(3, "mounted")
	_, err := f.Write([]byte{1})
	return errors.Join(err, f.Close())
}

func absolute(path string) string {
	if p, err := filepath.Abs(path); err == nil {
		return p
	}
	return path
}
