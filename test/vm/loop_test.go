package testvm_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	testvm "github.com/tidemark/tidemark/test/vm"
)

func makeFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoopDeviceWritesToItsFile(t *testing.T) {
	for name, opts := range map[string]testvm.LoopOptions{"buffered": {}, "direct": {DirectIO: true}} {
		t.Run(name, func(t *testing.T) {
			img := makeFile(t, 1<<20)
			dev := attachLoop(t, img, opts)
			f, err := os.OpenFile(dev, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte("tide"), 1024)
			_, err = f.WriteAt(want, 8192)
			if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(img)
			if err != nil || !bytes.Equal(got[8192:8192+4096], want) {
				t.Fatalf("the file does not have what was written (%v)", err)
			}
		})
	}
}

func TestReadOnlyLoopDeviceRefusesWrites(t *testing.T) {
	dev := attachLoop(t, makeFile(t, 1<<20), testvm.LoopOptions{ReadOnly: true})
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err == nil {
		_, err = f.Write(make([]byte, 4096))
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err == nil {
		t.Fatal("it was written to")
	}
}

func TestPartscanFindsPartitions(t *testing.T) {
	testvm.Require(t, "sfdisk")
	img := makeFile(t, 8<<20)
	sfdisk := exec.Command("sfdisk", "-q", img)
	sfdisk.Stdin = bytes.NewBufferString("label: gpt\nstart=2048, size=4096\n")
	if out, err := sfdisk.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dev := filepath.Base(attachLoop(t, img, testvm.LoopOptions{Partscan: true}))
	on, err := os.ReadFile(filepath.Join("/sys/block", dev, "loop/partscan"))
	if err != nil || string(on) != "1\n" {
		t.Fatalf("partscan is %q (%v)", on, err)
	}
	if _, err := os.Stat(filepath.Join("/sys/block", dev, dev+"p1")); err != nil {
		t.Skipf("SKIP: this kernel seems to be built without GPT partitions: %v", err)
	}
}

func TestDetachTellsThatTheDeviceIsInUse(t *testing.T) {
	testvm.RequireLoop(t)
	dev, detach, err := testvm.AttachLoop(t.Context(), makeFile(t, 1<<20), testvm.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	if err := detach(); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("got %v, want EBUSY", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := detach(); err != nil { // freed by the last close
		t.Fatal(err)
	}
}

func TestAttachLoopNeedsAFile(t *testing.T) {
	testvm.RequireLoop(t)
	_, _, err := testvm.AttachLoop(t.Context(), filepath.Join(t.TempDir(), "none"), testvm.LoopOptions{})
	if !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v, want ErrNotExist", err)
	}
}
