package blob_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
	"github.com/tidemark/tidemark/store/blob/blobtest"
)

func newDir(t *testing.T) *blob.Dir {
	t.Helper()
	d, err := blob.CreateDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDirConforms(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return newDir(t) })
}

func TestDirConformsWithNamedTempFiles(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store {
		d := newDir(t)
		blob.UseNamedTempFiles(d)
		return d
	})
}

func TestDirModesArePrivate(t *testing.T) {
	d := newDir(t)
	if err := d.Put(t.Context(), "a/b/c", bytes.NewReader([]byte("x")), 1); err != nil {
		t.Fatal(err)
	}
	unlock, err := d.Lock(t.Context(), "l")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unlock() }()
	err = filepath.WalkDir(d.Path(), func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == d.Path() {
			return err
		}
		st, err := e.Info()
		if err == nil && st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", p, st.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestDirFailedPutLeavesNoFile(t *testing.T) {
	for _, named := range []bool{false, true} {
		d := newDir(t)
		if named {
			blob.UseNamedTempFiles(d)
		}
		if err := d.Put(t.Context(), "a", bytes.NewReader(nil), 10); err == nil {
			t.Fatal("short Put succeeded")
		}
		entries, err := os.ReadDir(d.Path())
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) != 0 {
			t.Errorf("named=%v: left behind: %v", named, entries)
		}
	}
}

func TestOpenDirOfNothing(t *testing.T) {
	if _, err := blob.OpenDir(filepath.Join(t.TempDir(), "none")); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("error %v, want ErrNotFound", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := blob.OpenDir(file); err == nil {
		t.Error("OpenDir of a file succeeded")
	}
}

func TestCreateDirMakesParents(t *testing.T) {
	p := filepath.Join(t.TempDir(), "x", "y", "z")
	d, err := blob.CreateDir(p)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(d.Path())
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}
