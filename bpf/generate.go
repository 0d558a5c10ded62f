package bpf

// The object is built for little-endian machines only: those are the ones that
// hypervisors run on. -mcpu=v3 is needed for the atomic OR (kernel 5.12).
//go:generate go tool bpf2go -go-package bpf -target bpfel -cc clang-14 -strip llvm-strip-14 -cflags "-O2 -mcpu=v3 -Wall -Werror" tracker tracker.bpf.c

//go:generate go tool bpf2go -go-package bpf -target bpfel -cc clang-14 -strip llvm-strip-14 -cflags "-O2 -mcpu=v3 -Wall -Werror" files files.bpf.c
