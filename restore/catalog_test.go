package restore_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
	"github.com/tidemark/tidemark/store"
)

func TestCatalogShowsAllPoints(t *testing.T) {
	repo, _ := disktest.Repo(t)
	disks := [][]byte{disktest.Content(1<<20, 40), disktest.Content(300_032, 41)}
	first := disktest.Publish(t, repo, disktest.Spec{VM: "web", Time: noon, Disks: disks, Config: []byte(`{"cpus":2}`)})
	second := disktest.Publish(t, repo, disktest.Spec{VM: "web", Time: noon.Add(time.Minute), Disks: disks[:1]})
	disktest.Publish(t, repo, disktest.Spec{VM: "db", Time: noon, Disks: disks[1:]})
	c := restore.NewCatalog(repo, restore.NewCache(1<<20))

	if vms, err := c.VMs(t.Context()); err != nil || !slices.Equal(vms, []string{"db", "web"}) {
		t.Errorf("VMs: %v, %v", vms, err)
	}
	points, err := c.Points(t.Context(), "web")
	if err != nil || len(points) != 2 || points[0].ID != first.ID || points[1].ID != second.ID || !points[0].Time.Equal(noon) {
		t.Fatalf("points: %v, %v", points, err)
	}
	p, err := c.Point(t.Context(), points[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Disks) != 2 || p.Disks[1].Name != "disk1" || p.Disks[1].Size != 300_032 || string(p.Config) != `{"cpus":2}` || p.Consistency != "crash" {
		t.Errorf("details: %+v", p)
	}
	var doc struct{ ID, VM string }
	if err := json.Unmarshal(p.Document, &doc); err != nil || doc.ID != first.ID || doc.VM != "web" {
		t.Errorf("document: %+v, %v", doc, err)
	}
	for i, want := range disks {
		d, closer, err := c.Open(t.Context(), p, i)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, d.Size())
		if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("disk %d differs, %v", i, err)
		}
		if err := closer.Close(); err != nil {
			t.Error(err)
		}
	}
	found, err := c.Find(t.Context(), "web@latest")
	if err != nil || found.ID != second.ID {
		t.Errorf("find: %+v, %v", found, err)
	}
	if a, b := c.Identity(p, 0), c.Identity(p, 1); a == b || a == c.Identity(found, 0) {
		t.Errorf("identities are not unique: %s, %s", a, b)
	}
}

func TestCatalogSaysWhatIsNotThere(t *testing.T) {
	repo, _ := disktest.Repo(t)
	there := disktest.Publish(t, repo, disktest.Spec{VM: "vm", Time: noon, Disks: [][]byte{make([]byte, 4096)}})
	c := restore.NewCatalog(repo, restore.NewCache(1<<20))
	if _, err := c.Find(t.Context(), "nobody@latest"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("find: %v", err)
	}
	if _, err := c.Point(t.Context(), restore.PointInfo{VM: "nobody", ID: there.ID, Time: noon}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("point: %v", err)
	}
}
