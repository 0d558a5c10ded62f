package cbt_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// dmTargets skips the test if the kernel has not all these device-mapper targets.
func dmTargets(t *testing.T, targets ...string) {
	t.Helper()
	out, err := exec.Command("dmsetup", "targets").CombinedOutput()
	if err != nil {
		elsewhere(t, "no device mapper: %v", err)
	}
	have := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 0 {
			have[f[0]] = true
		}
	}
	for _, want := range targets {
		if !have[want] {
			elsewhere(t, "no target %s in this kernel's device mapper", want)
		}
	}
}

// dmCreate makes a device-mapper device that ends with the test.
func dmCreate(t *testing.T, name, table string) (string, error) {
	t.Helper()
	if out, err := exec.Command("dmsetup", "create", name, "--table", table).CombinedOutput(); err != nil {
		return "", fmt.Errorf("dmsetup create with table %q: %w: %s", table, err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("dmsetup", "remove", "--retry", name).CombinedOutput(); err != nil {
			t.Errorf("dmsetup remove: %v: %s", err, out)
		}
	})
	return "/dev/mapper/" + name, nil
}

// mapped is dmCreate with a name after the device below.
func mapped(t *testing.T, below, what, format string, args ...any) string {
	t.Helper()
	dev, err := dmCreate(t, "tidemark-"+what+"-"+filepath.Base(below), fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// linearDevice makes a device of two halves that have changed places.
func linearDevice(t *testing.T, size int64) string {
	t.Helper()
	dmTargets(t, "linear")
	below, half := loopDevice(t, size, ""), size/1024
	return mapped(t, below, "linear", "0 %d linear %s %d\n%d %d linear %s 0", half, below, half, half, half, below)
}

// delayDevice makes a device whose writes take their time.
func delayDevice(t *testing.T, size int64, delay time.Duration) string {
	t.Helper()
	dmTargets(t, "delay")
	below := loopDevice(t, size, "")
	return mapped(t, below, "delay", "0 %d delay %s 0 0 %s 0 %d", size/512, below, below, delay.Milliseconds())
}

// thinDevice makes a thin volume in a pool that has room for all of it.
func thinDevice(t *testing.T, size int64) string {
	t.Helper()
	dmTargets(t, "thin-pool", "thin")
	meta, data := loopDevice(t, 4<<20, ""), loopDevice(t, size+4<<20, "")
	pool := mapped(t, data, "pool", "0 %d thin-pool %s %s 128 0", (size+4<<20)/512, meta, data)
	if out, err := exec.Command("dmsetup", "message", pool, "0", "create_thin 0").CombinedOutput(); err != nil {
		t.Fatalf("create_thin: %v: %s", err, out)
	}
	return mapped(t, data, "thin", "0 %d thin %s 0", size/512, pool)
}

// cryptDevice makes an encrypted device, with the first cipher that the kernel has.
func cryptDevice(t *testing.T, size int64) string {
	t.Helper()
	dmTargets(t, "crypt")
	below := loopDevice(t, size, "")
	var errs []error
	for _, c := range []struct {
		cipher string
		key    int // bytes
	}{{"aes-xts-plain64", 64}, {"aes-cbc-plain64", 32}, {"cipher_null-ecb", 0}} {
		key := "-"
		if c.key > 0 {
			key = strings.Repeat("5a", c.key/2) + strings.Repeat("c3", c.key/2)
		}
		dev, err := dmCreate(t, "tidemark-crypt-"+filepath.Base(below),
			fmt.Sprintf("0 %d crypt %s %s 0 %s 0 1 allow_discards", size/512, c.cipher, key, below))
		if err == nil {
			t.Log("cipher ", c.cipher)
			return dev
		}
		errs = append(errs, err)
	}
	elsewhere(t, "dm-crypt finds no cipher: %v", errs)
	return ""
}

// originDevice makes a device with a snapshot: a first write to a chunk waits until
// the old data was copied away.
func originDevice(t *testing.T, size int64) string {
	t.Helper()
	dmTargets(t, "snapshot", "snapshot-origin")
	below, cow := loopDevice(t, size, ""), loopDevice(t, size+8<<20, "")
	mapped(t, below, "snapshot", "0 %d snapshot %s %s N 8", size/512, below, cow)
	return mapped(t, below, "origin", "0 %d snapshot-origin %s", size/512, below)
}
