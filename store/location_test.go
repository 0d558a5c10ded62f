package store

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/store/blob/s3"
	"github.com/tidemark/tidemark/store/blob/s3/s3test"
)

func FuzzLocation(f *testing.F) {
	for _, s := range []string{"/srv/backup", "dir:/srv:1", "s3:bucket/x", "s3:https://h:9000/bucket/x?region=y", "ftp:x", "./a:b", "s3:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, location string) {
		p, err := parseLocation(location)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || p != (site{}) {
				t.Fatalf("%+v, %v", p, err)
			}
			return
		}
		if (p.dir == "") == (p.s3 == s3.Location{}) {
			t.Fatalf("%q is neither or both: %+v", location, p)
		}
	})
}

// s3Repo makes a repository on a server of its own.
func s3Repo(t *testing.T) (*Repo, *s3test.Server) {
	t.Helper()
	srv := s3test.Start(t)
	r, err := testInit(t.Context(), "s3:"+srv.Endpoint+"/"+s3test.Bucket+"/repo")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	r.dataPackLen, r.nodePackLen = 256<<10, 4<<10
	return r, srv
}

func TestS3Repository(t *testing.T) {
	r, srv := s3Repo(t)
	image := make([]byte, 1<<20)
	for i := range 3 {
		p := noise(uint64(i), 64<<10)
		copy(image[i*(128<<10):], p)
		backup(t, r, DiskOptions{Size: 1 << 20}, write{int64(i * (128 << 10)), p})
	}
	if _, err := testInit(t.Context(), r.Location()); !errors.Is(err, ErrExists) {
		t.Errorf("second Init: %v", err)
	}
	o, err := testOpen(t.Context(), r.Location())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	p, err := o.Find(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	wantClean(t, o, p)
	wantDisk(t, o, p, image)

	// The objects are the same as in a folder, so they can be copied there and back.
	local, err := testOpen(t.Context(), filepath.Join(srv.Dir, s3test.Bucket, "repo"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = local.Close() }()
	wantClean(t, local, p)
	wantDisk(t, local, p, image)

	if _, err := testOpen(t.Context(), "s3:"+srv.Endpoint+"/"+s3test.Bucket+"/other"); !errors.Is(err, ErrNotRepository) {
		t.Errorf("Open of nothing: %v", err)
	}
	if _, err := testOpen(t.Context(), "s3:"+srv.Endpoint+"/no-bucket/x"); err == nil || errors.Is(err, ErrNotRepository) {
		t.Errorf("Open without a bucket: %v", err)
	}
}
