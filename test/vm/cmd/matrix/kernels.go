package main

import (
	"fmt"
	"strings"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// defaultKernels are one of every series that Debian's archive offered when this was
// written, and every flavour of the release that is supported first.
var defaultKernels = []string{
	"bullseye-security/linux-image-cloud-amd64", // 5.10: too old, and must say so
	"bookworm-security/linux-image-cloud-amd64", // 6.1
	"bookworm-security/linux-image-amd64",
	"bookworm-security/linux-image-rt-amd64",
	"bookworm-security/linux-image-6.12-cloud-amd64",
	"bookworm-security/linux-image-6.12-amd64",
	"bookworm-security/linux-image-6.12-rt-amd64",
	"trixie-backports/linux-image-6.16-cloud-amd64",
	"trixie-backports/linux-image-6.17-cloud-amd64",
	"trixie-backports/linux-image-6.18-cloud-amd64",
	"sid/linux-image-7.2-cloud-amd64",
	"trixie-backports/linux-image-7.3-cloud-amd64",
}

// parseKernel reads SUITE/PACKAGE; without a suite it is bookworm's.
func parseKernel(spec string) (testvm.KernelSource, error) {
	suite, pkg, ok := strings.Cut(spec, "/")
	if !ok {
		suite, pkg = "bookworm", spec
	}
	if suite == "" || pkg == "" {
		return testvm.KernelSource{}, fmt.Errorf("%q is not SUITE/PACKAGE", spec)
	}
	return testvm.KernelSource{Suite: suite, Package: pkg}, nil
}

// tooOld tells that a kernel lacks what the tracker needs (docs/limits.md): under it,
// only the refusal is tested.
func tooOld(release string) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 {
		return false
	}
	return major < 5 || major == 5 && minor < 17
}
