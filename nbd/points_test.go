package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

const pointSize = 4 << 20

// vmImages are the contents of a disk at three points: two grains change, then one
// becomes zeroes.
func vmImages(seed byte) [][]byte {
	first := make([]byte, pointSize)
	copy(first, pattern(pointSize/2, seed))
	second := bytes.Clone(first)
	copy(second[100_000:], "changed")
	copy(second[3<<20:], pattern(64<<10, seed+1))
	third := bytes.Clone(second)
	clear(third[640<<10 : 704<<10])
	return [][]byte{first, second, third}
}

// publishVM makes a point an hour of each image.
func publishVM(t *testing.T, repo *store.Repo, vm string, images [][]byte) (points []*store.Point) {
	t.Helper()
	for i, image := range images {
		points = append(points, disktest.Publish(t, repo, disktest.Spec{VM: vm, Time: noon.Add(time.Duration(i) * time.Hour), Disks: [][]byte{image}}))
	}
	return points
}

func TestPointsAreExportsByAllTheirNames(t *testing.T) {
	repo, _ := disktest.Repo(t)
	images := vmImages(1)
	web := publishVM(t, repo, "web1", images)
	two := disktest.Publish(t, repo, disktest.Spec{VM: "db", Time: noon, Disks: [][]byte{images[0], images[1]}})
	torn := disktest.Publish(t, repo, disktest.Spec{VM: "torn", Time: noon, Disks: images[:1], Consistency: store.None})
	s := NewPoints(restore.NewCatalog(repo, restore.NewCache(1<<20)))
	only := NewPoints(restore.NewCatalog(repo, restore.NewCache(1<<20)), "db")
	name := func(vm string, p *store.Point, disk string) string { return vm + "@" + p.ID + "/" + disk }
	for _, c := range []struct {
		name   string
		want   string // its proper name; empty: there is none
		moving bool
		image  []byte
	}{
		{"web1", name("web1", web[2], "disk0"), true, images[2]},
		{"web1/disk0", name("web1", web[2], "disk0"), true, images[2]},
		{"web1@latest", name("web1", web[2], "disk0"), true, images[2]},
		{"web1@latest/disk0", name("web1", web[2], "disk0"), true, images[2]},
		{"web1@" + web[0].ID, name("web1", web[0], "disk0"), false, images[0]},
		{"web1@" + web[1].ID[:8] + "/disk0", name("web1", web[1], "disk0"), false, images[1]},
		{"web1@2026-11-22T13:00:00Z/disk0", name("web1", web[1], "disk0"), true, images[1]},
		{"web1@2026-11-22T12-59-59Z", name("web1", web[0], "disk0"), true, images[0]},
		{"db@" + two.ID + "/disk1", name("db", two, "disk1"), false, images[1]},
		{"torn@" + torn.ID, name("torn", torn, "disk0"), false, images[0]},
		{name: "db@latest"}, // which of its disks?
		{name: "db@latest/disk2"},
		{name: "torn"},
		{name: "torn@latest/disk0"},
		{name: "web1@2025-01-01T00:00:00Z"},
		{name: "web1@0000000000000000"},
		{name: "web1@yesterday"},
		{name: "web1@"},
		{name: "web1/"}, // as without
		{name: "nobody"},
		{name: "../web1"},
		{name: "@latest"},
		{name: ""},
		{name: strings.Repeat("x", 4096)},
	} {
		e, err := s.Open(t.Context(), Client{}, c.name)
		if c.name == "web1/" && err == nil {
			e.release()
			continue
		}
		if c.want == "" {
			if !errors.Is(err, ErrUnknownExport) {
				t.Errorf("%q: %v", c.name, err)
			}
			continue
		}
		if err != nil || e.Name != c.want || e.Moving != c.moving || !e.ReadOnly {
			t.Errorf("%q is %+v, %v", c.name, e, err)
			continue
		}
		got := make([]byte, pointSize)
		if _, err := e.Disk.ReadAt(got, 0); err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(got, c.image) {
			t.Errorf("%q: other content, %v", c.name, err)
		}
		e.release()
	}
	if len(s.open) != 0 {
		t.Errorf("%d disks are left open", len(s.open))
	}
	if _, err := only.Open(t.Context(), Client{}, "web1@latest"); !errors.Is(err, ErrUnknownExport) {
		t.Errorf("a VM that was not named: %v", err)
	}
	if list, err := only.List(t.Context(), Client{}); err != nil || len(list) != 4 || !strings.HasPrefix(list[0].Name, "db@latest/") {
		t.Errorf("list of one VM: %v, %v", list, err)
	}
}

func TestPointsAreOpenWhileTheyAreUsed(t *testing.T) {
	repo, _ := disktest.Repo(t)
	images := vmImages(2)
	points := publishVM(t, repo, "vm", images)
	exports := NewPoints(restore.NewCatalog(repo, restore.NewCache(1<<20)))
	open := func() int {
		exports.mu.Lock()
		defer exports.mu.Unlock()
		return len(exports.open)
	}
	server := &Server{Exports: exports}
	socket, stop := start(t, server)
	enter := func(name string) *peer {
		p := dial(t, "unix", socket)
		p.enter(name, true)
		return p
	}
	read := func(p *peer, want byte) {
		t.Helper()
		p.request(0, cmdRead, 1, 100_000, 7)
		if a := p.answer(100_000, 7); a.data[0] != want {
			t.Errorf("read %q", a.data)
		}
	}
	one, same := enter("vm@latest"), enter("vm@"+points[2].ID)
	if n := open(); n != 1 {
		t.Errorf("%d disks open for one under two names", n)
	}
	old := enter("vm@" + points[0].ID + "/disk0")
	read(one, 'c')
	read(same, 'c')
	read(old, images[0][100_000])
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	read(same, 'c')
	// A point that is made now is there for those who come now.
	fourth := bytes.Clone(images[2])
	copy(fourth[100_000:], "Changed")
	disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon.Add(5 * time.Hour), Disks: [][]byte{fourth}})
	disktest.Publish(t, repo, disktest.Spec{VM: "new", Time: noon, Disks: [][]byte{fourth}})
	read(enter("vm@latest"), 'C')
	read(enter("new"), 'C')
	read(same, 'c')
	if err := same.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a disk nobody uses is closed", func() bool { return open() == 3 })
	stop()
	if n := open(); n != 0 {
		t.Errorf("%d disks open after the server's end", n)
	}
}

func TestPointsAreSharedByCrowds(t *testing.T) {
	repo, _ := disktest.Repo(t)
	points := publishVM(t, repo, "vm", vmImages(3))
	s := NewPoints(restore.NewCatalog(repo, restore.NewCache(1<<20)))
	var crowd sync.WaitGroup
	for i := range 8 {
		crowd.Go(func() {
			for k := range 50 {
				e, err := s.Open(t.Context(), Client{}, "vm@"+points[(i+k)%2].ID)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := e.Disk.ReadAt(make([]byte, 8192), int64(k)*8192); err != nil {
					t.Error(err)
				}
				e.release()
			}
		})
	}
	crowd.Wait()
	if len(s.open) != 0 {
		t.Errorf("%d disks are left open", len(s.open))
	}
}

func TestListsOfPointsAreBounded(t *testing.T) {
	repo, _ := disktest.Repo(t)
	image := [][]byte{pattern(64<<10, 1)}
	var ids []string
	for i := range 12 {
		ids = append(ids, disktest.Publish(t, repo, disktest.Spec{VM: "many", Time: noon.Add(time.Duration(i) * time.Hour), Disks: image}).ID)
	}
	few := disktest.Publish(t, repo, disktest.Spec{VM: "few", Time: noon, Disks: image})
	disktest.Publish(t, repo, disktest.Spec{VM: "torn", Time: noon, Disks: image, Consistency: store.None})
	s := NewPoints(restore.NewCatalog(repo, restore.NewCache(1<<20)))
	s.limit = 9
	for range 2 { // the second time from what was read before
		list, err := s.List(t.Context(), Client{})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, l := range list {
			names = append(names, l.Name)
			e, err := s.Open(t.Context(), Client{}, l.Name)
			if err != nil || e.Description != l.Description || !strings.Contains(e.Description, "consistency ") {
				t.Errorf("%+v cannot be opened, or is otherwise: %+v, %v", l, e, err)
				continue
			}
			e.release()
		}
		// "few" and what it left over of its third goes to the others.
		want := []string{"few@latest/disk0", "few@" + few.ID + "/disk0", "many@latest/disk0", "many@" + ids[11] + "/disk0", "many@" + ids[10] + "/disk0"}
		if len(names) != 6 || !slices.Equal(names[:5], want) || !strings.HasPrefix(names[5], "torn@") {
			t.Errorf("%q", names)
		}
	}
	e, err := s.Open(t.Context(), Client{}, "many@"+ids[0]+"/disk0") // not listed
	if err != nil {
		t.Fatal(err)
	}
	e.release()
	if len(s.disks) > s.limit {
		t.Errorf("%d documents are remembered", len(s.disks))
	}
}

func TestHistoryOfAPoint(t *testing.T) {
	repo, _ := disktest.Repo(t)
	images := vmImages(4)
	points := publishVM(t, repo, "vm", images)
	disktest.Publish(t, repo, disktest.Spec{VM: "other", Time: noon, Disks: images[:1]})
	exports := NewPoints(restore.NewCatalog(repo, restore.NewCache(1<<20)))
	e, err := exports.Open(t.Context(), Client{}, "vm@"+points[1].ID)
	if err != nil {
		t.Fatal(err)
	}
	defer e.release()
	if list, err := e.History.List(t.Context()); err != nil || fmt.Sprint(list) != fmt.Sprint([]string{points[0].ID}) {
		t.Errorf("older points: %v, %v", list, err)
	}
	for _, name := range []string{points[0].ID, points[0].ID[:6], "2026-11-22T12:30:00Z", points[1].ID, points[2].ID, "latest"} {
		d, release, err := e.History.Open(t.Context(), name)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if d.Size() != pointSize {
			t.Errorf("%q: %d bytes", name, d.Size())
		}
		release()
	}
	for _, name := range []string{"", "0000000000000000", "nonsense", "@latest", "latest/disk0"} {
		if _, _, err := e.History.Open(t.Context(), name); !errors.Is(err, ErrUnknownPast) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
