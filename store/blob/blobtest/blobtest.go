// Package blobtest is the conformance suite that every [blob.Store] must pass.
package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

// Run tests the contract of blob.Store, and of blob.Locker if the store is one.
// open returns a new empty store each time; Run closes it.
func Run(t *testing.T, open func(t *testing.T) blob.Store) {
	tests := []struct {
		name string
		run  func(*testing.T, blob.Store)
	}{
		{"PutThenGet", putThenGet},
		{"PutTakenName", putTakenName},
		{"PutTakenNameConcurrently", putConcurrently},
		{"PutShortReader", putShort},
		{"PutLongReader", putLong},
		{"PutFailingReader", putFailing},
		{"PutCancelled", putCancelled},
		{"GetRange", getRange},
		{"ReadAt", readAt},
		{"ReadTail", readTail},
		{"NotFound", notFound},
		{"InvalidNames", invalidNames},
		{"ListOrderAndPrefix", list},
		{"ListStops", listStops},
		{"ListDirs", listDirs},
		{"Delete", deleteObject},
		{"Lock", lock},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t)
			tt.run(t, s)
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

func put(t *testing.T, s blob.Store, name, content string) {
	t.Helper()
	if err := s.Put(t.Context(), name, bytes.NewReader([]byte(content)), int64(len(content))); err != nil {
		t.Fatalf("Put(%q): %v", name, err)
	}
}

func get(t *testing.T, s blob.Store, name string, off, n int64) string {
	t.Helper()
	r, err := s.Get(t.Context(), name, off, n)
	if err != nil {
		t.Fatalf("Get(%q, %d, %d): %v", name, off, n, err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("Get(%q, %d, %d): read: %v", name, off, n, err)
	}
	if err := r.Close(); err != nil {
		t.Fatalf("Get(%q, %d, %d): close: %v", name, off, n, err)
	}
	return string(b)
}

func names(t *testing.T, s blob.Store, prefix string) []string {
	t.Helper()
	var out []string
	for info, err := range s.List(t.Context(), prefix) {
		if err != nil {
			t.Fatalf("List(%q): %v", prefix, err)
		}
		out = append(out, info.Name)
	}
	return out
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

// wantAbsent makes sure that "a" is not there, nor anything else.
func wantAbsent(t *testing.T, s blob.Store) {
	t.Helper()
	_, err := s.Stat(t.Context(), "a")
	wantErr(t, "Stat", err, blob.ErrNotFound)
	if n := names(t, s, ""); len(n) != 0 {
		t.Errorf("List shows %q", n)
	}
}

func putThenGet(t *testing.T, s blob.Store) {
	big := string(bytes.Repeat([]byte("0123456789abcdef"), 1<<16)) // 1 MiB
	for name, content := range map[string]string{"a": "x", "empty": "", "deep/er/name": "yy", "big": big} {
		put(t, s, name, content)
		if got := get(t, s, name, 0, -1); got != content {
			t.Errorf("%s: got %d bytes, want %d", name, len(got), len(content))
		}
		info, err := s.Stat(t.Context(), name)
		if err != nil || info.Name != name || info.Size != int64(len(content)) {
			t.Errorf("Stat(%s) = %+v, %v", name, info, err)
		}
	}
}

func putTakenName(t *testing.T, s blob.Store) {
	put(t, s, "d/a", "first")
	err := s.Put(t.Context(), "d/a", bytes.NewReader([]byte("second")), 6)
	wantErr(t, "Put", err, blob.ErrExists)
	if got := get(t, s, "d/a", 0, -1); got != "first" {
		t.Errorf("content is now %q", got)
	}
}

func putConcurrently(t *testing.T, s blob.Store) {
	const n = 8
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() {
			c := fmt.Sprintf("content %d", i)
			errs[i] = s.Put(t.Context(), "new/folder/a", bytes.NewReader([]byte(c)), int64(len(c)))
		})
	}
	wg.Wait()
	won := -1
	for i, err := range errs {
		switch {
		case err == nil && won >= 0:
			t.Fatalf("Puts %d and %d both succeeded", won, i)
		case err == nil:
			won = i
		default:
			wantErr(t, "Put", err, blob.ErrExists)
		}
	}
	if won < 0 {
		t.Fatal("no Put succeeded")
	}
	if got, want := get(t, s, "new/folder/a", 0, -1), fmt.Sprintf("content %d", won); got != want {
		t.Errorf("content %q, want %q", got, want)
	}
}

func putShort(t *testing.T, s blob.Store) {
	err := s.Put(t.Context(), "a", bytes.NewReader([]byte("12345")), 6)
	wantErr(t, "Put", err, io.ErrUnexpectedEOF)
	wantAbsent(t, s)
}

func putLong(t *testing.T, s blob.Store) {
	if err := s.Put(t.Context(), "a", bytes.NewReader([]byte("1234567")), 6); err == nil {
		t.Error("Put took more bytes than announced")
	}
	wantAbsent(t, s)
}

func putFailing(t *testing.T, s blob.Store) {
	broken := errors.New("broken source")
	r := io.MultiReader(bytes.NewReader(make([]byte, 100)), errReader{broken})
	wantErr(t, "Put", s.Put(t.Context(), "a", r, 1000), broken)
	wantAbsent(t, s)
	put(t, s, "a", "afterwards the name is free")
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func putCancelled(t *testing.T, s blob.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := io.MultiReader(bytes.NewReader(make([]byte, 100)), readFunc(func(p []byte) (int, error) {
		cancel() // in the middle of the object
		return len(p), nil
	}))
	wantErr(t, "Put", s.Put(ctx, "a", r, 10<<20), context.Canceled)
	wantAbsent(t, s)
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

func getRange(t *testing.T, s blob.Store) {
	put(t, s, "a", "0123456789")
	for _, tt := range []struct {
		off, n int64
		want   string
	}{{0, 4, "0123"}, {3, 4, "3456"}, {8, 10, "89"}, {10, 1, ""}, {4, -1, "456789"}, {2, 0, ""}} {
		if got := get(t, s, "a", tt.off, tt.n); got != tt.want {
			t.Errorf("Get(%d, %d) = %q, want %q", tt.off, tt.n, got, tt.want)
		}
	}
}

func readAt(t *testing.T, s blob.Store) {
	put(t, s, "a", "0123456789")
	for _, tt := range []struct {
		off  int64
		len  int
		want string
		err  error
	}{{0, 10, "0123456789", nil}, {4, 3, "456", nil}, {8, 5, "89", io.EOF}, {10, 1, "", io.EOF}, {50, 1, "", io.EOF}} {
		p := make([]byte, tt.len)
		n, err := s.ReadAt(t.Context(), "a", p, tt.off)
		if string(p[:n]) != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("ReadAt(%d bytes, %d) = %q, %v; want %q, %v", tt.len, tt.off, p[:n], err, tt.want, tt.err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.ReadAt(ctx, "a", make([]byte, 1), 0)
	wantErr(t, "ReadAt, cancelled", err, context.Canceled)
}

func readTail(t *testing.T, s blob.Store) {
	const content = "0123456789"
	put(t, s, "a/b", content)
	put(t, s, "a/empty", "")
	for _, n := range []int{0, 1, 4, 9, 10, 11, 1000} {
		p := make([]byte, n)
		got, size, err := blob.ReadTail(t.Context(), s, "a/b", p)
		want := content[max(0, len(content)-n):]
		if err != nil || size != int64(len(content)) || string(p[:got]) != want {
			t.Errorf("ReadTail of %d bytes: %q of %d, %v, want %q of %d", n, p[:got], size, err, want, len(content))
		}
	}
	if n, size, err := blob.ReadTail(t.Context(), s, "a/empty", make([]byte, 5)); n != 0 || size != 0 || err != nil {
		t.Errorf("ReadTail of an empty object: %d of %d, %v", n, size, err)
	}
	for _, name := range []string{"a", "a/c", "a/b/c"} {
		if _, _, err := blob.ReadTail(t.Context(), s, name, make([]byte, 5)); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("ReadTail(%q) gives %v, want ErrNotFound", name, err)
		}
	}
	if _, _, err := blob.ReadTail(t.Context(), s, "../a", make([]byte, 5)); !errors.Is(err, blob.ErrName) {
		t.Errorf("ReadTail of an invalid name gives %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := blob.ReadTail(ctx, s, "a/b", make([]byte, 5)); !errors.Is(err, context.Canceled) {
		t.Errorf("ReadTail with a cancelled context gives %v", err)
	}
}

func notFound(t *testing.T, s blob.Store) {
	put(t, s, "folder/a", "x")
	for _, name := range []string{"b", "folder", "folder/b", "folder/a/b"} {
		_, err := s.Stat(t.Context(), name)
		wantErr(t, "Stat "+name, err, blob.ErrNotFound)
		_, err = s.ReadAt(t.Context(), name, make([]byte, 1), 0)
		wantErr(t, "ReadAt "+name, err, blob.ErrNotFound)
		_, err = s.Get(t.Context(), name, 0, -1)
		wantErr(t, "Get "+name, err, blob.ErrNotFound)
		wantErr(t, "Delete "+name, s.Delete(t.Context(), name), blob.ErrNotFound)
	}
	if n := names(t, s, "nothing/here"); len(n) != 0 {
		t.Errorf("List of nothing: %q", n)
	}
}

func invalidNames(t *testing.T, s blob.Store) {
	for _, name := range []string{"", "/a", "a/", "a//b", "..", "../a", "a/../b", ".", "a/.", ".hidden", "a/.b", "a\x00b", "a b", "ä", string(make([]byte, 2000))} {
		wantErr(t, fmt.Sprintf("Put %q", name), s.Put(t.Context(), name, bytes.NewReader(nil), 0), blob.ErrName)
		_, err := s.Stat(t.Context(), name)
		wantErr(t, fmt.Sprintf("Stat %q", name), err, blob.ErrName)
		_, err = s.Get(t.Context(), name, 0, -1)
		wantErr(t, fmt.Sprintf("Get %q", name), err, blob.ErrName)
		_, err = s.ReadAt(t.Context(), name, nil, 0)
		wantErr(t, fmt.Sprintf("ReadAt %q", name), err, blob.ErrName)
		wantErr(t, fmt.Sprintf("Delete %q", name), s.Delete(t.Context(), name), blob.ErrName)
	}
}

func list(t *testing.T, s blob.Store) {
	// "a-b" and "a.c" sort before "a/x": byte order of whole names, not of folders.
	all := []string{"a-b", "a.c/d", "a/x", "a/y/1", "a/y/2", "a/z", "a0", "b"}
	for _, i := range []int{5, 0, 7, 3, 1, 6, 2, 4} {
		put(t, s, all[i], all[i])
	}
	for prefix, want := range map[string][]string{
		"":      all,
		"a":     all[:7],
		"a/":    all[2:6],
		"a/y":   all[3:5],
		"a/y/":  all[3:5],
		"a/y/2": all[4:5],
		"a.":    all[1:2],
		"c":     nil,
		"b/":    nil,
		"../":   nil,
	} {
		if got := names(t, s, prefix); !slices.Equal(got, want) {
			t.Errorf("List(%q) = %q, want %q", prefix, got, want)
		}
	}
	for info, err := range s.List(t.Context(), "a.c/") {
		if err != nil || info.Size != 5 {
			t.Errorf("List: %+v, %v", info, err)
		}
	}
}

func listStops(t *testing.T, s blob.Store) {
	for i := range 10 {
		put(t, s, fmt.Sprintf("d%d/x", i), "x")
	}
	seen := 0
	for _, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		if seen++; seen == 3 {
			break
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var last error
	for _, err := range s.List(ctx, "") {
		last = err
	}
	wantErr(t, "List, cancelled", last, context.Canceled)
}

func listDirs(t *testing.T, s blob.Store) {
	for _, n := range []string{"p/b/1", "p/b/2", "p/a/x/y", "p/file", "q/c/1"} {
		put(t, s, n, "")
	}
	for prefix, want := range map[string][]string{"p/": {"a", "b"}, "": {"p", "q"}, "p/b/": nil, "none/": nil} {
		got, err := s.ListDirs(t.Context(), prefix)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("ListDirs(%q) = %q, %v; want %q", prefix, got, err, want)
		}
	}
	_, err := s.ListDirs(t.Context(), "p")
	wantErr(t, "ListDirs without slash", err, blob.ErrName)
}

func deleteObject(t *testing.T, s blob.Store) {
	put(t, s, "d/a", "1")
	put(t, s, "d/b", "2")
	if err := s.Delete(t.Context(), "d/a"); err != nil {
		t.Fatal(err)
	}
	if got := names(t, s, ""); !slices.Equal(got, []string{"d/b"}) {
		t.Errorf("left: %q", got)
	}
	put(t, s, "d/a", "again")
	if got := get(t, s, "d/a", 0, -1); got != "again" {
		t.Errorf("content %q", got)
	}
}

func lock(t *testing.T, s blob.Store) {
	l, ok := s.(blob.Locker)
	if !ok {
		t.Skip("SKIP: this store has no locks")
	}
	unlock, err := l.Lock(t.Context(), "vm-a")
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.Lock(t.Context(), "vm-a")
	wantErr(t, "second Lock", err, blob.ErrLocked)
	other, err := l.Lock(t.Context(), "vm-b")
	if err != nil {
		t.Fatalf("Lock of another name: %v", err)
	}
	if err := errors.Join(unlock(), other()); err != nil {
		t.Fatal(err)
	}
	unlock, err = l.Lock(t.Context(), "vm-a")
	if err != nil {
		t.Fatalf("Lock after unlock: %v", err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	_, err = l.Lock(t.Context(), "../x")
	wantErr(t, "Lock of a bad name", err, blob.ErrName)
	if n := names(t, s, ""); len(n) != 0 {
		t.Errorf("locks are listed as objects: %q", n)
	}
}
