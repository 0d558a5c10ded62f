package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"

	testvm "github.com/tidemark/tidemark/test/vm"
)

// diskSize is what the tests look for, see scratchDisk in cbt's tests.
const diskSize = 24 << 20

// guest describes the virtual machine: a disk of each bus, and the modules of each kind.
func guest(ctx context.Context, k *testvm.Kernel, o options) (testvm.Run, error) {
	run := testvm.Run{
		Kernel:    k,
		Accel:     o.accel,
		MemoryMiB: 2048,
		Modules:   []string{"virtio_pci", "virtio_blk", "virtio_rng", "loop"},
		Optional: []string{
			"nvme", "virtio_scsi", "sd_mod", "scsi_debug dev_size_mb=24 lbpu=1 lbpws=1", "nbd nbds_max=4", "lzo-rle", "lzo", "zram", "brd rd_nr=1 rd_size=24576",
			"dm-mod", "dm-delay", "dm-thin-pool", "dm-crypt", "dm-snapshot",
			"xts", "cbc", "ecb", "crypto_null", // the kernel asks for algorithms by a program that the guest has not
			"raid0", "raid1", "raid10", "raid456", "linear", "md-linear",
		},
		Disks: []testvm.ScratchDisk{{Size: diskSize}, {Size: diskSize, Bus: testvm.SCSI}, {Size: diskSize, Bus: testvm.NVMe}},
		Tools: []string{"fio", "losetup", "sfdisk", "partx", "blkdiscard", "dmsetup", "mdadm", "nbd-client", "nbdkit", "unshare", "mount", "nvme"},
	}
	plugin, err := nbdkitPlugin(ctx)
	if err != nil {
		return run, err
	}
	run.Files = map[string]string{plugin: plugin}

	// The programs' own limits come before that of the guest, so that a test that
	// hangs tells where.
	own := "-test.timeout=" + (o.limit - o.limit/20).String()
	var env []string
	if o.epochs != "" {
		env = append(env, "TIDEMARK_TRUTH_EPOCHS="+o.epochs)
	}
	if o.writes != "" {
		env = append(env, "TIDEMARK_TRUTH_WRITES="+o.writes)
	}
	run.Programs = []testvm.Program{{Path: o.command, Args: []string{"doctor"}}}
	if !tooOld(k.Release) {
		run.Programs = append(run.Programs, testvm.Program{Path: o.cbtTest, Env: env, Args: []string{"-test.v", own, "-test.run=^TestTruth$/^(" + orAll(o.kinds) + ")$"}})
		if o.kinds == "" {
			run.Programs = append(run.Programs, testvm.Program{Path: o.cbtTest, Args: []string{"-test.v", own, "-test.skip=^TestTruth$"}})
		}
	}
	switch {
	case tooOld(k.Release):
		run.Programs = append(run.Programs, testvm.Program{Path: o.bpfTest, Args: []string{"-test.v", own, "-test.run=OldKernel|WithoutBTF"}})
	case o.kinds == "":
		run.Programs = append(run.Programs, testvm.Program{Path: o.bpfTest, Args: []string{"-test.v", own, "-test.skip=Header|SixtyFour|Sixteen"}})
	}
	return run, nil
}

func orAll(kinds string) string {
	if kinds == "" {
		return ".*"
	}
	return kinds
}

// nbdkitPlugin finds the plugin that keeps a disk in memory.
func nbdkitPlugin(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "nbdkit", "--dump-config").Output()
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(out)) {
		if dir, ok := strings.CutPrefix(strings.TrimSpace(line), "plugindir="); ok {
			return filepath.Join(dir, "nbdkit-memory-plugin.so"), nil
		}
	}
	return filepath.Join("/usr/lib/nbdkit/plugins", "nbdkit-memory-plugin.so"), nil
}
