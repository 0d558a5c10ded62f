package testvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/tidemark/tidemark/internal/initramfs"
)

// archive is an initramfs in a file.
type archive struct {
	*initramfs.Writer
	f *os.File
}

func createInitramfs(path string) (*archive, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	return &archive{initramfs.New(f), f}, nil
}

// program copies an executable, and the shared libraries it needs to where it
// looks for them.
func (a *archive) program(ctx context.Context, name, host string) {
	if a.Err() != nil {
		return
	}
	a.Host(name, host, 0o755)
	out, err := run(ctx, "", "ldd", host)
	if err != nil {
		if ctx.Err() != nil {
			a.Fail(err)
		}
		return // static
	}
	for field := range strings.FieldsSeq(string(out)) {
		if filepath.IsAbs(field) {
			a.Host(field, field, 0o755)
		}
	}
}

// close ends the archive and reports the first error of all.
func (a *archive) close() error { return errors.Join(a.Close(), a.f.Close()) }
