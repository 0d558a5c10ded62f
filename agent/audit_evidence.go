package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tidemark/tidemark/cbt"
)

// auditEvidence is audit.json of an evidence directory.
type auditEvidence struct {
	Tool      string       `json:"tool"`
	Host      string       `json:"host"`
	Kernel    string       `json:"kernel"`
	VM        string       `json:"vm"`
	Point     string       `json:"point"`
	PointTime time.Time    `json:"point_time"`
	ChangeID  string       `json:"change_id"`
	Written   time.Time    `json:"written"`
	Seed      uint64       `json:"seed"`
	Tracker   cbt.Evidence `json:"tracker"` // when the first mismatch was found, before its epoch was made unknown
	Disk      AuditedDisk  `json:"disk"`
}

// keep writes the evidence of the disk's mismatches and returns its directory, which
// is there as a whole or not at all.
func (d *diskAudit) keep() (dir string, err error) {
	doc := auditEvidence{
		Tool: d.Tool, Kernel: proc("osrelease"), Host: proc("hostname"),
		VM: d.VM, Point: d.point.ID, PointTime: d.point.Time, ChangeID: d.disk.ChangeID, Written: time.Now().UTC(),
		Seed: d.Seed, Tracker: d.evidence, Disk: d.out,
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return "", err
	}
	parent, err := filepath.Abs(d.Evidence)
	if err != nil {
		return "", err
	}
	// It holds the guest's data.
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(parent, ".writing-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if err := writeSynced(filepath.Join(tmp, "audit.json"), append(b, '\n')); err != nil {
		return "", err
	}
	for _, m := range d.out.Mismatches {
		if err := writeSynced(filepath.Join(tmp, fmt.Sprintf("disk-%d.bin", m.Off)), m.data); err != nil {
			return "", err
		}
	}
	if err := syncPath(tmp); err != nil {
		return "", err
	}
	dir = filepath.Join(parent, fmt.Sprintf("%s-%s-%s", doc.Written.Format("20060102T150405.000000000Z"), d.VM, d.disk.Name))
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	return dir, errors.Join(syncPath(parent), syncPath(filepath.Dir(parent)))
}

// proc reads one of the kernel's names for this host; empty if it has none.
func proc(name string) string {
	b, _ := os.ReadFile("/proc/sys/kernel/" + name)
	return strings.TrimSpace(string(b))
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
