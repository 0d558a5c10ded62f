# `make demo` shows what Tidemark does; `make test` proves it. Both install what
# they need with apt-get when they run as root.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LINT     = $(GO) tool -modfile=tools/go.mod golangci-lint
FUZZTIME ?= 30s
comma := ,

.PHONY: all build demo test deps generate check-generate lint unit fuzz bench bench-tracking bench-tracking-vm bench-incremental bench-repository bench-scale bench-boot bench-mount truth campaign vmtest vmtest-files vmtest-nbd test-files matrix crash flood model clean help

all: build

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## bin/tidemark, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/tidemark ./cmd/tidemark

demo: build ## the main job once, on real parts: needs root
	test/deps.sh run
	$(GO) run ./test/demo bin/tidemark

test: deps check-generate lint unit ## everything that must pass

deps: bin/versitygw ## what the tests need, from Debian packages, and an S3 server
	test/deps.sh build run

# The S3 server that tests run. Built once: 100 s of a processor, 45 MB.
bin/versitygw: tools/s3/go.mod tools/s3/go.sum
	mkdir -p bin
	cd tools/s3 && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ github.com/versity/versitygw/cmd/versitygw \
	  || echo 'no S3 server could be built: the tests that need one will be SKIPPED' >&2

generate: ## rebuild the BPF object
	$(GO) generate ./bpf

check-generate: generate
	@git diff --exit-code --stat -- bpf || { echo 'bpf: the committed object is not what its source makes: commit the result of "make generate"'; exit 1; }

lint: ## golangci-lint, pinned in tools/go.mod
	$(LINT) run --allow-parallel-runners ./...

# Packages run one after the other: they measure pauses and boot emulated
# machines, and would take each other's processors.
unit:
	$(GO) vet ./...
	$(GO) test -race -p 1 -timeout 20m ./...

fuzz: ## every fuzz target for FUZZTIME
	test/fuzz.sh $(FUZZTIME)

bench: build ## the NBD server beside qemu-nbd and nbdkit (BENCHFLAGS=)
	test/deps.sh run
	$(GO) build -o bin/nbdbench ./test/bench/nbdbench
	bin/nbdbench -tidemark bin/tidemark $(BENCHFLAGS)

# What else each can be told is in docs/benchmarks.md: BENCHFLAGS='-busy -json'.
bench-tracking: ## what tracking costs the writer, on this host (BENCHFLAGS=)
	test/deps.sh run
	mkdir -p bin
	$(GO) build -o bin/trackbench ./test/bench/trackbench
	bin/trackbench $(BENCHFLAGS)

# Quiet is the host that counts; the guest is asked to measure whatever it sees.
bench-tracking-vm: ## the same beside dm-era and dm-snapshot, under a Debian kernel in QEMU (KERNEL=package, BENCHFLAGS=)
	test/deps.sh build run
	mkdir -p bin
	CGO_ENABLED=0 $(GO) build -o bin/trackbench ./test/bench/trackbench
	CGO_ENABLED=0 $(GO) build -o bin/vmtest ./test/vm/cmd/vmtest
	@echo "the host's load: $$(cat /proc/loadavg)"
	bin/vmtest -kernel $(or $(KERNEL),linux-image-cloud-amd64) -timeout 120m -modules virtio_pci,virtio_blk,virtio_rng,loop,dm-mod,dm-era,dm-snapshot \
	  -disk nvme:96 -disk nvme:128 -disk 96 -disk 128 $(foreach t,fio dmsetup,-tool $$(PATH=$$PATH:/usr/sbin:/sbin command -v $t)) \
	  bin/trackbench -busy -rounds 7 -seconds 2 -stat-rounds 1 -devices loop -size 96 -scratch /dev/nvme0n1:/dev/nvme1n1 -scratch /dev/vda:/dev/vdb \
	  -layers none,attached,tracked,linear,era,snapshot $(BENCHFLAGS)

bench-incremental: build ## an incremental beside restic, borg and a full compare (BENCHDIR=, BENCHFLAGS=)
	test/deps.sh run bench
	$(GO) build -o bin/incrbench ./test/bench/incrbench
	bin/incrbench -tidemark bin/tidemark $(if $(BENCHDIR),-dir $(BENCHDIR)) $(BENCHFLAGS)

bench-scale: ## 1,000 points of a disk of 16 TiB: requests, metadata, memory, garbage collection (BENCHFLAGS=; -s3 with bin/versitygw)
	mkdir -p bin
	$(GO) build -o bin/scalebench ./test/bench/scalebench
	bin/scalebench $(BENCHFLAGS)

bench-repository: build ## a full backup, its repository, restore and random reads beside restic, borg and cp (BENCHDIR=, BENCHFLAGS=)
	test/deps.sh run bench
	$(GO) build -o bin/repobench ./test/bench/repobench
	bin/repobench -tidemark bin/tidemark $(if $(BENCHDIR),-dir $(BENCHDIR)) $(BENCHFLAGS)

bench-boot: ## booting a point over NBD beside booting the restored file (BENCHFLAGS=)
	test/deps.sh run
	mkdir -p bin
	$(GO) build -o bin/bootbench ./test/bench/bootbench
	bin/bootbench $(BENCHFLAGS)

bench-mount: build ## reads from a mounted point beside a plain file, nbdfuse and qemu-storage-daemon (BENCHDIR=, BENCHFLAGS=)
	test/deps.sh run
	$(GO) build -o bin/mountbench ./test/bench/mountbench
	bin/mountbench -tidemark bin/tidemark $(if $(BENCHDIR),-dir $(BENCHDIR)) $(BENCHFLAGS)

truth: ## the truth test for longer: EPOCHS swaps (default 5000)
	TIDEMARK_TRUTH_EPOCHS=$${EPOCHS:-5000} $(GO) test -count 1 -timeout 2h -v -run 'TestTruth$$' ./cbt

campaign: ## truth with fast writers: WRITES random writes per kind of device (default 1000000; KINDS=a,b)
	TIDEMARK_TRUTH_WRITES=$${WRITES:-1000000} $(GO) test -count 1 -timeout 8h -v -run 'TestTruth$$/^($(or $(subst $(comma),|,$(KINDS)),.*))$$' ./cbt

vmtest: ## the tracker's tests under one Debian kernel in QEMU (KERNEL=SUITE/PACKAGE)
	$(MAKE) matrix KERNELS=$(or $(KERNEL),bookworm-security/linux-image-cloud-amd64)

matrix: ## truth for kernel × device kind, in QEMU (KERNELS=SUITE/PACKAGE,... KINDS=a,b WRITES=n EPOCHS=n)
	test/deps.sh build run
	mkdir -p bin
	CGO_ENABLED=0 $(GO) test -c -o bin/cbt.test ./cbt
	CGO_ENABLED=0 $(GO) test -c -o bin/bpf.test ./bpf
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/tidemark ./cmd/tidemark
	$(GO) run ./test/vm/cmd/matrix $(if $(KERNELS),-kernels '$(KERNELS)') $(if $(KINDS),-kinds '$(KINDS)') $(if $(WRITES),-writes $(WRITES)) $(if $(EPOCHS),-epochs $(EPOCHS)) \
	  bin/cbt.test bin/bpf.test bin/tidemark

test-files: ## guests' own files: 5,000 on each kind of file system, and 100 damaged ones of each: 30 minutes emulated
	test/deps.sh run
	TIDEMARK_FILES=5000 TIDEMARK_CORRUPT=100 $(GO) test -count=1 -v -timeout 60m ./guestfs/...

vmtest-files: ## image files on ext4, xfs and btrfs under a Debian kernel in QEMU: 35 minutes emulated
	test/deps.sh build run
	mkdir -p bin
	CGO_ENABLED=0 $(GO) test -c -o bin/cbt.test ./cbt
	CGO_ENABLED=0 $(GO) test -c -o bin/agent.test ./agent
	$(GO) run ./test/vm/cmd/vmtest -kernel $(or $(KERNEL),linux-image-cloud-amd64) -timeout 80m -memory 2048 -modules virtio_pci,virtio_blk,virtio_rng,loop,dm-mod,dm-delay,xfs,btrfs \
	  $(foreach t,fio losetup sfdisk partx blkdiscard dmsetup mkfs.ext4 mkfs.xfs mkfs.btrfs xfs_io chattr,-tool $$(PATH=$$PATH:/usr/sbin:/sbin command -v $t)) \
	  bin/cbt.test -test.v -test.run '^TestFile' -test.timeout 60m -- bin/agent.test -test.v -test.run 'Image' -test.timeout 15m

vmtest-nbd: ## attach: the kernel's NBD client under a Debian kernel in QEMU: 5 minutes emulated (KERNEL=package SUITE=suite)
	test/deps.sh build run
	mkdir -p bin
	CGO_ENABLED=0 $(GO) test -c -o bin/kernel.test ./nbd/kernel
	CGO_ENABLED=0 $(GO) test -c -o bin/tidemark.test ./cmd/tidemark
	$(GO) run ./test/vm/cmd/vmtest -kernel $(or $(KERNEL),linux-image-cloud-amd64) $(if $(SUITE),-suite $(SUITE)) -timeout 25m -memory 2048 -modules virtio_pci,virtio_blk,virtio_rng,loop,nbd \
	  $(foreach t,nbd-client fio mkfs.ext4 e2fsck losetup mount,-tool $$(PATH=$$PATH:/usr/sbin:/sbin command -v $t)) \
	  bin/kernel.test -test.v -test.timeout 10m -- bin/tidemark.test -test.v -test.run 'Attach' -test.timeout 12m

# Each operation of store/killed_test.go; TIDEMARK_TEST_ENCRYPTED makes all repositories of the tests encrypted. OPERATIONS=regexp picks some.
crash: ## kill -9 and power failures at every moment of every operation that changes a repository, in a folder and on S3, plain and encrypted: 1 hour (OPERATIONS=)
	TIDEMARK_TEST_EVERY_MOMENT=1 $(GO) test -count 1 -timeout 3h -v -run 'Killed/$(OPERATIONS)' ./store
	TIDEMARK_TEST_EVERY_MOMENT=1 TIDEMARK_TEST_ENCRYPTED=1 $(GO) test -count 1 -timeout 3h -v -run 'Killed/$(OPERATIONS)' ./store

flood: ## 1,000 NBD clients that stall at every moment, and vanish or stay (CLIENTS=n)
	TIDEMARK_TEST_CLIENTS=$(or $(CLIENTS),1000) $(GO) test -count 1 -timeout 20m -v -run 'TestThousand|TestFlood' ./nbd

model: ## Spin: epochs and garbage collection keep their properties, broken variants do not
	test/deps.sh model
	$(GO) run ./test/model

clean:
	rm -rf bin
