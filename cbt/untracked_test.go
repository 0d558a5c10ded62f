package cbt_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/cbt"
)

func openUntracked(t *testing.T, file string) *cbt.Untracked {
	t.Helper()
	u, err := cbt.OpenUntracked(file, "nobody looks")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u
}

func untrackedFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, make([]byte, small), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// As long as nobody can write, a file that was handed out once has not changed.
func TestUntrackedIsReadOnceWhileNobodyCanWrite(t *testing.T) {
	u := openUntracked(t, untrackedFile(t))
	wantUnknown(t, changes(t, u, cbt.ChangeID{}), small, "nobody looks")
	if d := changes(t, u, cbt.ChangeID{}); len(d.Extents) > 0 || len(d.Unknown) > 0 {
		t.Errorf("the second time: %s", describe(d))
	}
	if n, err := u.Writes(); n != 0 || err != nil {
		t.Errorf("writes %d, %v", n, err)
	}
}

func TestUntrackedKnowsThatSomebodyCanWrite(t *testing.T) {
	file := untrackedFile(t)
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	u := openUntracked(t, file)
	for range 2 {
		wantUnknown(t, changes(t, u, cbt.ChangeID{}), small, "it is open for writing")
	}
	if _, err := u.Writes(); !errors.Is(err, cbt.ErrUncounted) || !errors.Is(err, cbt.ErrOpenForWriting) {
		t.Errorf("got %v", err)
	}
}

// Who wants to write need not wait for the backup, which notices.
func TestUntrackedYieldsToAWriter(t *testing.T) {
	file := untrackedFile(t)
	u := openUntracked(t, file)
	changes(t, u, cbt.ChangeID{})
	begin := time.Now()
	if err := os.WriteFile(file, make([]byte, small), 0o600); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("a writer had to wait for %v", took)
	}
	if _, err := u.Writes(); !errors.Is(err, cbt.ErrUncounted) {
		t.Errorf("got %v", err)
	}
	wantUnknown(t, changes(t, u, cbt.ChangeID{}), small, "opened for writing while it was read")
}

func TestUntrackedOfAnotherSize(t *testing.T) {
	file := untrackedFile(t)
	u := openUntracked(t, file)
	if err := os.Truncate(file, 2*small); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Changes(t.Context(), cbt.ChangeID{}); !errors.Is(err, cbt.ErrDeviceChanged) {
		t.Errorf("got %v", err)
	}
}
