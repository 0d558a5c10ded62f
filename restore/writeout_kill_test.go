package restore_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// restoreChild names the file that this process shall restore to, if it is the
// child of the test below.
const restoreChild = "TIDEMARK_TEST_RESTORE"

// stuckDisk never gets past its first MiB, as long as standard input is open.
type stuckDisk struct{ disktest.Bytes }

func (d stuckDisk) ReadAtContext(_ context.Context, p []byte, off int64) (int, error) {
	if off >= 1<<20 {
		return os.Stdin.Read(p[:1])
	}
	return d.ReadAt(p, off)
}

func restoreSlowly(path string) error {
	d := stuckDisk{bytes.Repeat([]byte("x"), 4<<20)}
	_, err := restore.WriteTo(context.Background(), d, path, restore.WriteOptions{Progress: func(done, _ int64) {
		fmt.Printf("done %d\n", done)
	}})
	return err
}

func TestKilledRestoreLeavesNoFileOfThatName(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), restoreChild+"="+path)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe() // stays open
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "done 1048576\n" {
		t.Errorf("child says %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("a killed restore left the file: %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || !strings.HasPrefix(entries[0].Name(), ".disk.raw.partial-") {
		t.Errorf("it left %v, %v", entries, err)
	}
	// And is no hindrance to the next one.
	if _, err := restore.WriteTo(t.Context(), emptyDisk(4096), path, restore.WriteOptions{}); err != nil {
		t.Error(err)
	}
}
