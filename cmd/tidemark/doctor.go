package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/bpf"
)

// finding is a row of doctor.
type finding struct {
	For   string `json:"for"` // what needs it
	Check string `json:"check"`
	State string `json:"state"` // "ok", "missing", "absent" (not needed)
	Note  string `json:"note"`
}

func newDoctor(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Say what this host can do, and what will be used",
		Long: `Say what this host can do, and what will be used. Exits with 3 if writes can't be
tracked here. It changes nothing.`,
		Example: "  tidemark doctor\n  tidemark doctor -r /srv/backup   # looks at the repository's file system too",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			checks, can := bpf.Probe(), true
			all := make([]finding, 0, len(checks)+8)
			for _, k := range checks {
				f := finding{For: "tracking", Check: k.Name, State: "ok", Note: k.Note}
				if k.Err != nil {
					f.State, f.Note, can = "missing", k.Err.Error(), false
				}
				all = append(all, f)
			}
			all = append(all, imageFindings()...)
			all = append(all, fuseFindings()...)
			all = append(all, nbdFinding(), kvmFinding(), qemuFinding())
			all = append(all, snapshotFindings(g.repo)...)
			if g.json {
				if err := printJSON(c.OutOrStdout(), all); err != nil {
					return err
				}
			} else {
				t := newTable(c.OutOrStdout(), "FOR", "CHECK", "STATE", "NOTE")
				for _, f := range all {
					t.row(f.For, f.Check, f.State, f.Note)
				}
				if err := t.flush(); err != nil {
					return err
				}
			}
			if !can {
				return fmt.Errorf("%w on this host as it is; restore points can still be read", bpf.ErrUntrackable)
			}
			if !g.json && !g.quiet {
				_, _ = fmt.Fprintln(c.OutOrStdout(), "\nWrites to block devices will be tracked with eBPF; instants are found by converging (read, swap, pause).")
			}
			return nil
		},
	}
}

// imageFindings says on which file systems image files are tracked.
func imageFindings() []finding {
	var out []finding
	for _, fs := range bpf.FileSystems() {
		f := finding{For: "image files", Check: fs, State: "ok", Note: "tracked by the file system's own operations (fentry)"}
		if err := bpf.CanTrackFiles(fs); err != nil {
			f.State, f.Note = "absent", fmt.Sprintf("compared, and only while nobody has them open for writing: %v", err)
		}
		out = append(out, f)
	}
	return out
}

func fuseFindings() []finding {
	dev := finding{For: "mount", Check: "/dev/fuse", State: "ok"}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		dev.State, dev.Note = "missing", "modprobe fuse"
	}
	helper := finding{For: "mount", Check: "fusermount3", State: "ok", Note: "mounting as a plain user"}
	if p, err := exec.LookPath("fusermount3"); err != nil {
		helper.State, helper.Note = "absent", "only root can mount (apt-get install fuse3)"
	} else {
		helper.Note = p
	}
	return []finding{dev, helper}
}

func nbdFinding() finding {
	f := finding{For: "attach", Check: "kernel NBD client", State: "absent", Note: "exports work without it; QEMU has its own client"}
	if _, err := os.Stat("/sys/module/nbd"); err == nil {
		f.State, f.Note = "ok", "/dev/nbdN"
	}
	return f
}

func kvmFinding() finding {
	f := finding{For: "boot", Check: "/dev/kvm", State: "absent", Note: "guests run here by emulation, slowly"}
	if k, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err == nil {
		_ = k.Close()
		f.State, f.Note = "ok", "can be opened; whether guests run is not tried"
	}
	return f
}

func qemuFinding() finding {
	f := finding{For: "boot", Check: "qemu-system-x86_64", State: "ok"}
	p, err := exec.LookPath(f.Check)
	if err != nil {
		f.State, f.Note = "absent", "apt-get install qemu-system-x86"
		return f
	}
	f.Note = p
	return f
}

// snapshotFindings says which storage snapshots exist. They are not used yet.
func snapshotFindings(dir string) []finding {
	thin := finding{For: "snapshot", Check: "device mapper", State: "absent", Note: "no thin snapshots"}
	if _, err := os.Stat("/dev/mapper/control"); err == nil {
		thin.State, thin.Note = "ok", "thin snapshots are not used yet: instants are found by converging"
	}
	if !strings.HasPrefix(dir, "/") {
		dir = os.TempDir()
	}
	link := finding{For: "snapshot", Check: "reflink in " + dir, State: "absent"}
	if err := tryReflink(dir); err != nil {
		link.Note = err.Error()
	} else {
		link.State, link.Note = "ok", "reflink snapshots are not used yet: instants are found by converging"
	}
	return []finding{thin, link}
}

func tryReflink(dir string) error {
	tmp, err := os.MkdirTemp(dir, ".tidemark-doctor-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	src := filepath.Join(tmp, "a")
	if err := os.WriteFile(src, make([]byte, 4096), 0o600); err != nil {
		return err
	}
	a, err := os.Open(src)
	if err != nil {
		return err
	}
	defer func() { _ = a.Close() }()
	b, err := os.Create(filepath.Join(tmp, "b"))
	if err != nil {
		return err
	}
	defer func() { _ = b.Close() }()
	if err := unix.IoctlFileClone(int(b.Fd()), int(a.Fd())); err != nil {
		return fmt.Errorf("the file system has none (%w)", err)
	}
	return nil
}
