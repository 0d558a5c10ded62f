package fusefs_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/tidemark/tidemark/fusefs"
	"github.com/tidemark/tidemark/restore/disktest"
)

// What people mount points for: one file out of a guest's disk.
func TestFileInsideADiskThroughALoopMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: a loop mount needs root")
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	tmp := t.TempDir()
	files, image, guest := tmp+"/files", tmp+"/image", tmp+"/guest"
	for _, dir := range []string{files + "/etc", guest} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]string{"etc/hostname": "guest\n", "big": string(disktest.Noise(3<<20, 1))}
	for name, content := range want {
		if err := os.WriteFile(filepath.Join(files, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "mkfs.ext4", "-q", "-d", files, image, "32M")
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	repo, _ := disktest.Repo(t)
	publish(t, repo, "vm", evening, content)
	dir := mount(t, repo, fusefs.Options{})

	out, err := exec.Command("mount", "-o", "loop,ro,noload", dir+"/vm/latest/disk0.raw", guest).CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: no loop mount to be had here: %v: %s", err, out)
	}
	defer run(t, "umount", guest)
	for name, content := range want {
		if got, err := os.ReadFile(filepath.Join(guest, name)); err != nil || string(got) != content {
			t.Errorf("%s inside the disk has %d bytes of other content, %v", name, len(got), err)
		}
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}
