package testvm

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestProbeBootsARealKernel(t *testing.T) {
	RequireVM(t)
	k, err := FetchKernel(t.Context(), KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	if err := bootProbe(t.Context(), k, TCG, time.Minute); err != nil {
		t.Fatal(err)
	}
}

func TestProbeGivesUpOnAKernelThatHangs(t *testing.T) {
	RequireVM(t)
	k, err := FetchKernel(t.Context(), KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	// No kernel gets to user space in this time, so it looks like a hanging one.
	err = bootProbe(t.Context(), k, TCG, 100*time.Millisecond)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

func TestAccelRemembersItsVerdict(t *testing.T) {
	RequireVM(t)
	k, err := FetchKernel(t.Context(), KernelSource{})
	if err != nil {
		t.Fatal(err)
	}
	first, err := Accel(t.Context(), k)
	if err != nil || first != KVM && first != TCG {
		t.Fatalf("got %q, %v", first, err)
	}
	// The image is gone, so another probe could not succeed.
	start := time.Now()
	again, err := Accel(t.Context(), &Kernel{Dir: k.Dir, Image: "/nonexistent"})
	if err != nil || again != first {
		t.Fatalf("got %q, %v; want %q in no time", again, err, first)
	}
	t.Logf("%s, remembered within %s", first, time.Since(start))
}

func TestMissingToolNamesItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	errs := Missing("qemu-system-x86_64", "busybox")
	if len(errs) != 2 || !errors.Is(errs[0], ErrMissing) || !strings.Contains(errs[0].Error(), "apt install qemu-system-x86)") {
		t.Fatalf("got %v", errs)
	}
}

func TestUnknownKernelPackage(t *testing.T) {
	RequireVM(t)
	t.Setenv("TIDEMARK_CACHE", t.TempDir())
	_, err := FetchKernel(t.Context(), KernelSource{Package: "linux-image-no-such-thing"})
	if err == nil || !strings.Contains(err.Error(), "linux-image-no-such-thing") {
		t.Fatalf("got %v", err)
	}
	if _, err := FetchKernel(t.Context(), KernelSource{Package: "../evil"}); err == nil {
		t.Fatal("a path was taken for a package")
	}
}

func TestImageMustNotBeTiny(t *testing.T) {
	if err := BuildImage(t.Context(), filepath.Join(t.TempDir(), "x"), 4096, ImageOptions{}); err == nil {
		t.Fatal("4 KiB were taken")
	}
}
