package testvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// CloudKernel is Debian's kernel for virtual machines. It has ext4 and NVMe
// built in, so it boots from an NVMe disk without an initramfs.
const CloudKernel = "linux-image-cloud-amd64"

// KernelSource says where to take a kernel from. Empty fields have defaults.
type KernelSource struct {
	Package string // Debian package or meta package, default CloudKernel
	Suite   string // default "bookworm"
	Mirror  string // default: where the host takes its own packages from
}

// Kernel is an unpacked kernel package.
type Kernel struct {
	Release string // as uname -r tells, "6.1.0-56-cloud-amd64"
	Image   string // path of the compressed kernel
	Dir     string // root of the unpacked package; modules are in lib/modules/Release
}

var (
	debianName = regexp.MustCompile(`^[a-z0-9][a-z0-9.+-]*$`)
	imageDep   = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-[0-9]\S*)$`)
)

// FetchKernel returns the kernel out of the cache, or fetches it by apt with
// package lists of its own, so that the host's stay as they are. Signatures are
// checked with Debian's keys. Safe for concurrent use, also by many processes.
func FetchKernel(ctx context.Context, src KernelSource) (*Kernel, error) {
	if src.Package == "" {
		src.Package = CloudKernel
	}
	if src.Suite == "" {
		src.Suite = "bookworm"
	}
	for _, s := range []string{src.Package, src.Suite} {
		if !debianName.MatchString(s) {
			return nil, fmt.Errorf("kernel: %q is not a name of Debian's", s)
		}
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "kernel", src.Suite+"-"+src.Package)
	err = cached(ctx, dir, func(tmp string) error { return unpackKernel(ctx, src, tmp) })
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", src.Package, err)
	}
	release, err := kernelRelease(dir)
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w (remove %s to fetch it again)", src.Package, err, dir)
	}
	return &Kernel{Release: release, Image: filepath.Join(dir, "boot", "vmlinuz-"+release), Dir: dir}, nil
}

// kernelRelease finds the one release in an unpacked kernel.
func kernelRelease(dir string) (string, error) {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return "", err
	}
	if len(images) != 1 {
		return "", fmt.Errorf("%d kernel images in it, want 1", len(images))
	}
	return strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-"), nil
}

// unpackKernel fills root with the content of the package.
func unpackKernel(ctx context.Context, src KernelSource, root string) (err error) {
	if src.Mirror == "" {
		if src.Mirror, err = hostMirror(ctx); err != nil {
			return err
		}
	}
	apt, err := os.MkdirTemp("", "tidemark-apt")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(apt)) }()
	for _, d := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(apt, d), 0o755); err != nil {
			return err
		}
	}
	list := fmt.Sprintf("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", src.Mirror, src.Suite)
	if err := os.WriteFile(filepath.Join(apt, "sources.list"), []byte(list), 0o644); err != nil {
		return err
	}
	opts := []string{
		"-qq",
		"-o", "Dir::Etc::SourceList=" + filepath.Join(apt, "sources.list"),
		"-o", "Dir::Etc::SourceParts=-",
		"-o", "Dir::State::Lists=" + filepath.Join(apt, "lists"),
		"-o", "Dir::Cache=" + apt,
		"-o", "APT::Sandbox::User=root", // its own user cannot read our folder
		"-o", "Acquire::Languages=none",
		"-o", "Acquire::Retries=3",
		"-o", "APT::Update::Error-Mode=any", // else a failed fetch is only a warning
	}
	if _, err := run(ctx, "", "apt-get", append(opts, "update")...); err != nil {
		return err
	}
	// The package named is usually a meta package: follow it to the image.
	deps, err := run(ctx, "", "apt-cache", append(opts, "depends", src.Package)...)
	if err != nil {
		return err
	}
	image := src.Package
	if m := imageDep.FindSubmatch(deps); m != nil {
		image = string(m[1])
	}
	if _, err := run(ctx, apt, "apt-get", append(opts, "download", image)...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(apt, "*.deb"))
	if err != nil {
		return err
	}
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d packages, want 1", image, len(debs))
	}
	if _, err := run(ctx, "", "dpkg-deb", "-x", debs[0], root); err != nil {
		return err
	}
	// From Debian 13 on /lib is merged into /usr. depmod and modprobe are given
	// one layout.
	if _, err := os.Stat(filepath.Join(root, "usr/lib/modules")); err == nil {
		if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
			return err
		}
	}
	release, err := kernelRelease(root)
	if err != nil {
		return err
	}
	_, err = run(ctx, "", "depmod", "-b", root, release)
	return err
}

// hostMirror is the Debian mirror that the host uses, which may be the only one
// that can be reached.
func hostMirror(ctx context.Context) (string, error) {
	out, err := run(ctx, "", "apt-get", "indextargets", "--format", "$(ORIGIN) $(SITE)", "Created-By: Packages")
	if err != nil {
		return "", err
	}
	for line := range bytes.Lines(out) {
		if site, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "Debian http"); ok {
			return "http" + site, nil
		}
	}
	// Lists that were never fetched name no origin.
	out, err = run(ctx, "", "apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages")
	if err != nil {
		return "", err
	}
	if site, _, _ := strings.Cut(string(out), "\n"); strings.HasPrefix(site, "http") {
		return site, nil
	}
	return "", errors.New("apt has no package source over HTTP: name a Debian mirror")
}
