package testvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// CloudKernel is Debian's kernel for virtual machines. It has ext4 and NVMe
// built in, so it boots from an NVMe disk without an initramfs.
const CloudKernel = "linux-image-cloud-amd64"

// KernelSource says where to take a kernel from. Empty fields have defaults.
type KernelSource struct {
	// Package is a Debian package or meta package, default CloudKernel. One of a
	// series, such as "linux-image-6.18-cloud-amd64", is the newest of that series if
	// the suite has no package of that very name.
	Package string
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
	// From 7.0 on, image, modules and the list of what is built in are packages of their own.
	partDep = regexp.MustCompile(`(?m)^\s*Depends: <?(linux-(?:base|binary|modules)-[0-9]\S*?)>?$`)
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
		// Security suites have a tree of their own beside the main one.
		src.Mirror = strings.TrimSuffix(strings.TrimSuffix(src.Mirror, "/"), "-security")
		if strings.HasSuffix(src.Suite, "-security") {
			src.Mirror += "-security"
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
	names, err := run(ctx, "", "apt-cache", append(opts, "pkgnames", "linux-image-")...)
	if err != nil {
		return err
	}
	image, err := ofSeries(src.Package, strings.Fields(string(names)))
	if err != nil {
		return err
	}
	// It is often a meta package: follow it to the image.
	deps, err := run(ctx, "", "apt-cache", append(opts, "depends", image)...)
	if err != nil {
		return err
	}
	if m := imageDep.FindSubmatch(deps); m != nil {
		image = string(m[1])
		if deps, err = run(ctx, "", "apt-cache", append(opts, "depends", image)...); err != nil {
			return err
		}
	}
	packages := []string{image}
	for _, m := range partDep.FindAllSubmatch(deps, -1) {
		packages = append(packages, string(m[1]))
	}
	if _, err := run(ctx, apt, "apt-get", append(append(opts, "download"), packages...)...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(apt, "*.deb"))
	if err != nil {
		return err
	}
	if len(debs) != len(packages) {
		return fmt.Errorf("apt-get download %v left %d packages", packages, len(debs))
	}
	for _, deb := range debs {
		if _, err := run(ctx, "", "dpkg-deb", "-x", deb, root); err != nil {
			return err
		}
	}
	// From Debian 13 on /lib is merged into /usr. depmod and modprobe are given
	// one layout.
	if _, err := os.Stat(filepath.Join(root, "usr/lib/modules")); err == nil {
		if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
			return err
		}
	}
	// From 7.0 on, the image lies with its modules.
	if images, _ := filepath.Glob(filepath.Join(root, "usr/lib/modules/*/vmlinuz")); len(images) == 1 {
		release := filepath.Base(filepath.Dir(images[0]))
		if err := os.MkdirAll(filepath.Join(root, "boot"), 0o755); err != nil {
			return err
		}
		if err := os.Rename(images[0], filepath.Join(root, "boot", "vmlinuz-"+release)); err != nil {
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

var seriesName = regexp.MustCompile(`^(linux-image-[0-9]+\.[0-9]+)(-[a-z].*)$`)

// ofSeries finds the package that is meant by name: itself, or the newest of the
// series it names.
func ofSeries(name string, have []string) (string, error) {
	m := seriesName.FindStringSubmatch(name)
	if m == nil || slices.Contains(have, name) {
		return name, nil
	}
	// "linux-image-6.18" + ".15+deb13" + "-cloud-amd64": no flavour has a dot, and
	// unsigned images end otherwise.
	of := regexp.MustCompile(`^` + regexp.QuoteMeta(m[1]) + `\.([0-9.]+)\+[^-]+` + regexp.QuoteMeta(m[2]) + `$`)
	newest, best := "", []int(nil)
	for _, n := range have {
		v := of.FindStringSubmatch(n)
		if v == nil {
			continue
		}
		var version []int
		for f := range strings.SplitSeq(v[1], ".") {
			i, _ := strconv.Atoi(f)
			version = append(version, i)
		}
		if newest == "" || slices.Compare(version, best) > 0 {
			newest, best = n, version
		}
	}
	if newest == "" {
		return "", fmt.Errorf("the suite has no %s*%s", m[1], m[2])
	}
	return newest, nil
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
