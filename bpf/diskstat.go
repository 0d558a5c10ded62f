package bpf

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// kernelSectors is what the kernel's own statistics counted as written or discarded on
// the device since it appeared, in sectors of 512 bytes (Documentation/block/stat.rst).
// False if they are turned off or not kept.
func (d Device) kernelSectors() (uint64, bool) {
	sys := "/sys/dev/block/" + d.Number()
	disk := sys
	if d.Partition {
		disk = filepath.Join(sys, "..")
	}
	if on, err := readUint(filepath.Join(disk, "queue/iostats")); err != nil || on == 0 {
		return 0, false
	}
	b, err := os.ReadFile(filepath.Join(sys, "stat"))
	if err != nil {
		return 0, false
	}
	n, err := parseStat(string(b))
	return n, err == nil
}

// parseStat adds sectors written (field 7) and discarded (field 14, from 4.18 on).
func parseStat(s string) (uint64, error) {
	f := strings.Fields(s)
	if len(f) < 7 {
		return 0, fmt.Errorf("%d fields", len(f))
	}
	n, err := strconv.ParseUint(f[6], 10, 64)
	if err != nil || len(f) < 14 {
		return n, err
	}
	d, err := strconv.ParseUint(f[13], 10, 64)
	return n + d, err
}

// uncounted tells whether the kernel counted more sectors than the programs saw submitted
// and completed. What one processor is just counting stands in one of them only.
func uncounted(kernel, submitted, completed uint64, cpus int) bool {
	return kernel > max(submitted, completed)+uint64(cpus)*countingSlack
}

// countingSlack is a large write, in sectors.
const countingSlack = 4096
