package mainjob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// files looks at every point through the mount, and compares it with the
// restored file.
func (j *job) files(ctx context.Context, r *Report) (err error) {
	j.say("Mount every point as files; restore each; compare")
	dir := filepath.Join(j.Dir, "points")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if _, err := j.tidemark(ctx, "mount", dir, "--daemon"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, command(context.WithoutCancel(ctx), "umount", dir)) }()
	disks, err := filepath.Glob(filepath.Join(dir, VM, "20*", "disk0.raw"))
	if err != nil {
		return err
	}
	if len(disks) != len(r.Rows) {
		return fmt.Errorf("the mount shows %d points, want %d", len(disks), len(r.Rows))
	}
	for i, row := range r.Rows {
		restored := filepath.Join(j.Dir, "restored.raw")
		if _, err := j.tidemark(ctx, "restore", VM+"@"+row.ID, "-o", restored, "--force"); err != nil {
			return err
		}
		a, err := hash(disks[i])
		if err != nil {
			return err
		}
		b, err := hash(restored)
		if err != nil {
			return err
		}
		if !bytes.Equal(a, b) {
			return fmt.Errorf("point %s: mounted disk0.raw is %x, restored file is %x", row.ID, a, b)
		}
		r.Hashes++
		j.tell("%s  mounted = restored = %x...", filepath.Base(filepath.Dir(disks[i])), a[:8])
	}
	return j.loopMount(ctx, disks[len(disks)-1])
}

// loopMount reads a file inside the mounted disk through the kernel's ext4.
func (j *job) loopMount(ctx context.Context, raw string) (err error) {
	dev, detach, err := testvm.AttachLoop(ctx, raw, testvm.LoopOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detach()) }()
	dir := filepath.Join(j.Dir, "guest")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// noload: the journal can't be replayed on a disk that can't be written.
	if err := command(ctx, "mount", "-t", "ext4", "-o", "ro,noload", dev, dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, command(context.WithoutCancel(ctx), "umount", dir)) }()
	b, err := os.ReadFile(filepath.Join(dir, "etc/motd"))
	if err != nil {
		return err
	}
	if string(b) != motd {
		return fmt.Errorf("a file inside the mounted disk holds %q", b)
	}
	j.tell("a file inside, through a loop mount: /etc/motd: %q", bytes.TrimSpace(b))
	return nil
}

func command(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w: %s", name, args, err, bytes.TrimSpace(out))
	}
	return nil
}

func hash(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}
