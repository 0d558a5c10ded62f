package testvm

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

//go:embed guest/source.sh
var sourceInit []byte

// MinImage is the smallest size of an image in bytes.
const MinImage = 32 << 20

// ImageOptions of a root file system.
type ImageOptions struct {
	Files map[string]string // path in the guest to content, besides the usual
}

// BuildImage makes an ext4 root file system of size bytes for a source VM at
// path, which is a file to be created or overwritten, or a block device; for a
// device, size 0 means all of it. Nothing is mounted, and no privilege is needed
// for a file. On failure the content of path is undefined.
func BuildImage(ctx context.Context, path string, size int64, opts ImageOptions) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("build image %s: %w", path, err)
		}
	}()
	st, err := os.Stat(path)
	device := err == nil && st.Mode().Type()&fs.ModeDevice != 0
	if (size != 0 || !device) && size < MinImage {
		return fmt.Errorf("size %d is below %d bytes", size, MinImage)
	}

	root, err := os.MkdirTemp("", "tidemark-root")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	for _, d := range []string{"bin", "dev", "proc", "sys", "tmp", "data"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	busybox, err := lookTool("busybox")
	if err != nil {
		return err
	}
	content, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), content, 0o755); err != nil {
		return err
	}
	applets, err := run(ctx, "", "busybox", "--list")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(applets)) {
		if name == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(root, "init"), sourceInit, 0o755); err != nil {
		return err
	}
	for name, text := range opts.Files {
		p := filepath.Join(root, filepath.Clean("/"+name))
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			return err
		}
	}

	if !device {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			return err
		}
	}
	// Lazy initialisation would have the guest's kernel write long after boot.
	args := []string{
		"-q", "-F", "-m", "0", "-b", "4096", "-L", "tidemark",
		"-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", "-d", root, path,
	}
	if size != 0 {
		args = append(args, strconv.FormatInt(size/4096, 10))
	}
	_, err = run(ctx, "", "mkfs.ext4", args...)
	return err
}
