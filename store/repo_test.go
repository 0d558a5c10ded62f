package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInitThenOpen(t *testing.T) {
	for _, prefix := range []string{"", "dir:"} {
		loc := prefix + filepath.Join(t.TempDir(), "new", "repo")
		r, err := testInit(t.Context(), loc)
		if err != nil {
			t.Fatal(err)
		}
		o, err := testOpen(t.Context(), loc)
		if err != nil {
			t.Fatal(err)
		}
		if o.ID() != r.ID() || len(o.ID()) != 32 || o.Location() != loc {
			t.Errorf("ids %q, %q; location %q", r.ID(), o.ID(), o.Location())
		}
		if err := errors.Join(r.Close(), o.Close()); err != nil {
			t.Error(err)
		}
		if _, err := testInit(t.Context(), loc); !errors.Is(err, ErrExists) {
			t.Errorf("second Init: %v", err)
		}
	}
}

func TestInitRefusesFolderInUse(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "letter.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := testInit(t.Context(), dir); !errors.Is(err, ErrExists) {
		t.Errorf("Init: %v", err)
	}
}

func TestOpenWhatIsNoRepository(t *testing.T) {
	empty, foreign := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "config"), []byte("[core]\n\tbare = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, loc := range []string{empty, foreign, filepath.Join(empty, "none")} {
		_, err := testOpen(t.Context(), loc)
		if !errors.Is(err, ErrNotRepository) || !strings.Contains(err.Error(), "tidemark init") {
			t.Errorf("Open(%s): %v", loc, err)
		}
	}
}

func TestInvalidLocations(t *testing.T) {
	for _, loc := range []string{"s3:", "s3://host/bucket", "s3:https://host", "", "dir:", "ftp:x"} {
		if _, err := testOpen(t.Context(), loc); !errors.Is(err, ErrInvalid) {
			t.Errorf("Open(%q): %v", loc, err)
		}
		if _, err := testInit(t.Context(), loc); !errors.Is(err, ErrInvalid) {
			t.Errorf("Init(%q): %v", loc, err)
		}
	}
}

func TestNewerVersionsAreToldFromDamage(t *testing.T) {
	r := testRepo(t)
	c := r.config
	c.Version = 2
	doc, err := encodeConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decodeConfig(doc); !errors.Is(err, ErrVersion) {
		t.Errorf("config: %v", err)
	}
	c = r.config
	c.Encryption.Mode = "aes-gcm"
	if doc, err = encodeConfig(c); err != nil {
		t.Fatal(err)
	}
	if _, err := decodeConfig(doc); !errors.Is(err, ErrVersion) {
		t.Errorf("encrypted config: %v", err)
	}

	load := func(b *packBuilder) error {
		rd, err := newReader(&oneObject{nil, b.finish()}, r.repo, r.codec, r.keys)
		if err != nil {
			t.Fatal(err)
		}
		_, err = rd.index(t.Context(), b.id)
		return err
	}
	b := builder(t, r, kindData, PackID{1})
	b.buf[8] = 9
	b.add([]byte("abc"), 3, codecRaw, plainHasher.sum([]byte("abc")))
	if err := load(b); !errors.Is(err, ErrVersion) {
		t.Errorf("pack: %v", err)
	}
	b = builder(t, r, kindData, PackID{1})
	b.add([]byte("abc"), 3, 0x20, plainHasher.sum([]byte("abc")))
	if err := load(b); !errors.Is(err, ErrVersion) {
		t.Errorf("record sealed in a newer way: %v", err)
	}

	body := []byte(`{"version":2,"new":true}`)
	h := r.ids.sum(body).String()
	n2 := PointName{VM: "a", ID: h[:16], Time: r.config.Created}
	if _, err := decodePoint([]byte("tidemark-point 2 "+h+"\n"+string(body)), r.pointObject(n2), n2, r.ids); !errors.Is(err, ErrVersion) {
		t.Errorf("point: %v", err)
	}
}
