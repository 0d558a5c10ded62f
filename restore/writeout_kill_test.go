package restore_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

// restoreChild names the file that this process shall restore to, if it is the
// child of the test below.
const restoreChild = "TIDEMARK_TEST_RESTORE"

// stuckDisk never gets past its first 4 MiB, as long as standard input is open.
type stuckDisk struct{ disktest.Bytes }

func (d stuckDisk) ReadAtContext(_ context.Context, p []byte, off int64) (int, error) {
	if off >= 4<<20 {
		return os.Stdin.Read(p[:1])
	}
	return d.ReadAt(p, off)
}

func slowContent() []byte { return bytes.Repeat([]byte("x"), 12<<20) }

func restoreSlowly(path string) error {
	_, inPlace := os.LookupEnv(restoreChild + "_IN_PLACE")
	_, err := restore.WriteTo(context.Background(), stuckDisk{slowContent()}, path, restore.WriteOptions{InPlace: inPlace, Progress: func(done, _ int64) {
		fmt.Printf("done %d\n", done)
	}})
	return err
}

// killAtFirstProgress runs a restore to path and kills it when something is done.
func killAtFirstProgress(t *testing.T, path, want string, env ...string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), env...), restoreChild+"="+path)
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
	if line != want {
		t.Errorf("child says %q, %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
}

// A restore over what exists leaves something that does not look like a disk when it is killed,
// and can be done again.
func TestKilledRestoreInPlaceHasNoHead(t *testing.T) {
	old := bytes.Repeat([]byte{0xdd}, 12<<20)
	file := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(file, old, 0o600); err != nil {
		t.Fatal(err)
	}
	targets := map[string]string{"file": file}
	if os.Geteuid() == 0 {
		targets["device"] = loopDevice(t, old)
	}
	for name, path := range targets {
		t.Run(name, func(t *testing.T) {
			killAtFirstProgress(t, path, "done 3145728\n", restoreChild+"_IN_PLACE=1")
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got[:1<<20], make([]byte, 1<<20)) || !bytes.Equal(got[1<<20:4<<20], slowContent()[:3<<20]) {
				t.Errorf("the head is not zero, or nothing was written behind it: %v", err)
			}
			if _, err := restore.WriteTo(t.Context(), disktest.Bytes(slowContent()), path, restore.WriteOptions{InPlace: true}); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, slowContent()) {
				t.Errorf("the second restore left something else, %v", err)
			}
		})
	}
}

func TestKilledRestoreLeavesNoFileOfThatName(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	killAtFirstProgress(t, path, "done 4194304\n")
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("a killed restore left the file: %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != ".disk.raw.partial" {
		t.Errorf("it left %v, %v", entries, err)
	}
	// And is no hindrance to the next one.
	if _, err := restore.WriteTo(t.Context(), emptyDisk(4096), path, restore.WriteOptions{}); err != nil {
		t.Error(err)
	}
}
