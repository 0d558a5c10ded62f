package bpf

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// kernelSymbol finds the address of a function of the kernel, or 0 if it is
// hidden (kptr_restrict) or not there.
func kernelSymbol(name string) (uint64, error) {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return 0, fmt.Errorf("addresses of kernel functions: %w", err)
	}
	defer func() { _ = f.Close() }()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		addr, rest, _ := strings.Cut(sc.Text(), " ")
		_, sym, _ := strings.Cut(rest, " ")
		if sym, _, _ = strings.Cut(sym, "\t"); sym != name {
			continue
		}
		n, err := strconv.ParseUint(addr, 16, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/kallsyms: %w", err)
		}
		return n, nil
	}
	return 0, sc.Err()
}
