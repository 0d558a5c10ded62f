package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/test/bench/measure"
)

func (b *bench) tidemark(t *tool, binary string) {
	pins := filepath.Join(filepath.Dir(bpf.DefaultDir), fmt.Sprintf("tidemark-bench-%d", os.Getpid()))
	call := func(args ...string) measure.Process {
		return measure.Process{Path: binary, Args: append(args, "-r", t.repo, "--pin-dir", pins)}
	}
	t.init = call("init")
	t.backup = call("backup", "vm", "--disk", b.image, "--json")
	t.restore = func(to string) measure.Process {
		return call("restore", "vm@latest", "-o", filepath.Join(to, "disk.raw"))
	}
	t.restored = "disk.raw"
	t.mount = call("mount", b.mnt(t), "--daemon")
	t.mounted = "vm/latest/disk0.raw"
	t.close = func() error { return bpf.Remove(pins) }
}

// borg extracts sparse, as the others do by themselves.
func (b *bench) borg(t *tool) {
	env := []string{
		"BORG_BASE_DIR=" + t.cache, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes", "BORG_RELOCATED_REPO_ACCESS_IS_OK=yes",
	}
	call := func(dir string, args ...string) measure.Process {
		return measure.Process{Path: "borg", Args: args, Env: env, Dir: dir}
	}
	archive := t.repo + "::full"
	t.init = call("", "init", "--encryption", "none", t.repo)
	t.backup = call(b.dir, "create", "-C", "zstd,3", archive, filepath.Base(b.image))
	t.restore = func(to string) measure.Process { return call(to, "extract", "--sparse", archive) }
	t.restored = "disk.raw"
	t.mount = call("", "mount", archive, b.mnt(t))
	t.mounted = "disk.raw"
}

// restic can't do without encryption.
func (b *bench) restic(t *tool) {
	call := func(args ...string) measure.Process {
		return measure.Process{
			Path: "restic", Args: append([]string{"-r", t.repo, "--cache-dir", t.cache}, args...),
			Env: []string{"RESTIC_PASSWORD=benchmark"}, Dir: b.dir,
		}
	}
	t.init = call("init", "--repository-version", "2")
	t.backup = call("backup", "--quiet", filepath.Base(b.image))
	t.restore = func(to string) measure.Process { return call("restore", "latest", "--target", to) }
	t.restored = "disk.raw"
	t.mount, t.foreground = call("mount", b.mnt(t)), true
	t.mounted = "snapshots/latest/disk.raw"
}
