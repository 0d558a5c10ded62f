package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/cilium/ebpf/btf"
)

// nvmeAdminOps are the operations of the admin queues of NVMe's drivers, struct blk_mq_ops in
// drivers/nvme/host/{pci,tcp,rdma,fc}.c. Hidden where the kernel has no CONFIG_KALLSYMS_ALL.
var nvmeAdminOps = []string{"nvme_mq_admin_ops", "nvme_tcp_admin_mq_ops", "nvme_rdma_admin_mq_ops", "nvme_fc_admin_mq_ops"}

// watchNVMe makes the programs know NVMe admin queues. It is called for every NVMe disk that is
// registered, as a driver that was loaded again has another place.
func (t *Tracker) watchNVMe() error {
	if !nvmeCommandComesFirst() {
		return nil
	}
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return fmt.Errorf("addresses of NVMe drivers: %w", err)
	}
	defer func() { _ = f.Close() }()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		// address, type, name, perhaps module
		w := strings.Fields(sc.Text())
		if len(w) < 3 {
			continue
		}
		i := slices.Index(nvmeAdminOps, w[2])
		if i < 0 {
			continue
		}
		addr, err := strconv.ParseUint(w[0], 16, 64)
		if err != nil {
			return fmt.Errorf("/proc/kallsyms: %w", err)
		}
		atomic.StoreUint64(&t.hostMap.words[hostNVMeOps+i], addr)
	}
	return sc.Err()
}

// nvmeCommandComesFirst tells whether struct nvme_request begins with the command, as the
// programs take it to.
func nvmeCommandComesFirst() bool {
	spec, err := btf.LoadKernelModuleSpec("nvme_core")
	if errors.Is(err, fs.ErrNotExist) {
		spec, err = btf.LoadKernelSpec() // built in
	}
	if err != nil {
		return false
	}
	var s *btf.Struct
	if spec.TypeByName("nvme_request", &s) != nil || len(s.Members) == 0 {
		return false
	}
	return s.Members[0].Name == "cmd" && s.Members[0].Offset == 0
}
