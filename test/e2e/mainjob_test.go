package e2e

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/test/mainjob"
	testvm "github.com/tidemark/tidemark/test/vm"
)

// The whole main job: track, back up a running VM, mount, restore, export, boot.
func TestMainJob(t *testing.T) {
	testvm.RequireRoot(t)
	testvm.RequireVM(t)
	testvm.RequireLoop(t)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("SKIP: no /dev/fuse")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	r, err := mainjob.Run(ctx, mainjob.Options{
		Binary: binary, Dir: t.TempDir(), Out: t.Output(), Incrementals: 3, DiskSize: 512 << 20, PauseBudget: 500 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	r.Print(&table)
	t.Log(table.String())
	for _, row := range r.Rows[1:] {
		// A handful of files were written; what is read must not grow with the disk.
		if row.Read > 64<<20 {
			t.Errorf("incremental %s read %d bytes", row.ID, row.Read)
		}
	}
}
