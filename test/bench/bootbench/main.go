// Command bootbench compares booting a restore point over NBD, while its disk is read from the repository, with booting
// the file that the same point was restored to. Both are the same QEMU, in turns; each
// boot over NBD opens the repository anew, so nothing is decoded yet.
//
//	go run ./test/bench/bootbench [-rounds 5] [-json]
//
// The time of a boot is from the decision to boot (the repository is not even open) to the guest's last word: that all files
// on its disk have the right checksums. The page cache is warm on both sides. -image, -kernel, -append, -bus and -expect
// boot something else, such as a whole Debian.
package main

import (
	"context"
	"crypto/md5"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
	"github.com/tidemark/tidemark/test/bench/measure"
	testvm "github.com/tidemark/tidemark/test/vm"
	"github.com/tidemark/tidemark/vm"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == vm.GuardCommand {
		status, err := vm.RunGuard(os.Args[2:])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(status)
	}
	measure.Main("bootbench", run)
}

type options struct {
	rounds, files           int
	json, busy              bool
	image, kernel, cmd, bus string
	expect                  string
}

func run(ctx context.Context, args []string) error {
	var o options
	f := flag.NewFlagSet("bootbench", flag.ContinueOnError)
	f.IntVar(&o.rounds, "rounds", 5, "boots of each kind")
	f.IntVar(&o.files, "files", 48, "files of 512 KiB that the guest reads and checks")
	f.BoolVar(&o.json, "json", false, "print JSON")
	f.BoolVar(&o.busy, "busy", false, "measure though the machine is busy")
	f.StringVar(&o.image, "image", "", "raw image to boot instead of the test guest's")
	f.StringVar(&o.kernel, "kernel", "", "with -image: kernel to boot it with; empty: its own boot loader")
	f.StringVar(&o.cmd, "append", "", "with -kernel: its command line")
	f.StringVar(&o.bus, "bus", "nvme", "virtio, sata, nvme or scsi")
	f.StringVar(&o.expect, "expect", `TIDEMARK-GUEST complete \d+\n`, "what the console shows at the end of a boot")
	if err := f.Parse(args); err != nil {
		return err
	}
	host, err := measure.ThisHost()
	if err != nil {
		return err
	}
	if err := host.Quiet(o.busy, os.Stderr); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bootbench")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	b := &bench{o: o, dir: dir, raw: filepath.Join(dir, "restored.raw"), repo: filepath.Join(dir, "repo")}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	return b.measure(ctx, host)
}

type bench struct {
	o                 options
	dir, raw, repo    string
	expect            *regexp.Regexp
	machine           vm.Config
	accel             string
	overNBD, fromFile measure.Sample
}

// prepare makes the repository and the restored file.
func (b *bench) prepare(ctx context.Context) (err error) {
	if b.expect, err = regexp.Compile(b.o.expect); err != nil {
		return err
	}
	if b.o.image == "" {
		k, err := testvm.FetchKernel(ctx, testvm.KernelSource{})
		if err != nil {
			return err
		}
		b.o.image, b.o.kernel = filepath.Join(b.dir, "source.raw"), k.Image
		b.o.cmd = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on root=/dev/nvme0n1 rootfstype=ext4 ro init=/init tidemark.mode=show"
		if err := testvm.BuildImage(ctx, b.o.image, 256<<20, testvm.ImageOptions{Files: sequence(b.o.files)}); err != nil {
			return err
		}
	}
	b.machine = vm.Config{
		Version: vm.FormatVersion, Name: "bench", CPUs: 1, Memory: 512 << 20, Clock: vm.UTC,
		Firmware: vm.Firmware{Type: vm.BIOS}, Disks: []vm.Disk{{Name: "disk0", Bus: vm.Bus(b.o.bus)}},
	}
	if b.o.kernel != "" {
		b.machine.Firmware = vm.Firmware{Type: vm.Kernel, Kernel: b.o.kernel, CommandLine: b.o.cmd}
	}
	if b.accel, err = vm.ProbeAccel(ctx, "", ""); err != nil {
		return err
	}
	return b.backup(ctx)
}

// sequence are files as the test guest writes and checks them.
func sequence(n int) map[string]string {
	files := map[string]string{}
	rnd := rand.NewChaCha8([32]byte{1})
	for i := range n {
		body := make([]byte, 512<<10)
		_, _ = rnd.Read(body)
		name := fmt.Sprintf("%06d", i+1)
		files["data/seq-"+name] = fmt.Sprintf("seq %s %x\n", name, md5.Sum(body)) + string(body)
	}
	return files
}

// backup stores the image as a point and restores that.
func (b *bench) backup(ctx context.Context) (err error) {
	repo, err := store.Init(ctx, b.repo)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	image, err := os.Open(b.o.image)
	if err != nil {
		return err
	}
	defer func() { _ = image.Close() }()
	st, err := image.Stat()
	if err != nil {
		return err
	}
	w, err := repo.Begin(ctx, "bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Abort()) }()
	d, err := w.Disk(ctx, store.DiskOptions{Name: "disk0", Source: b.o.image, Size: st.Size()})
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < st.Size(); off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), st.Size()-off)]
		if _, err := image.ReadAt(p, off); err != nil {
			return err
		}
		if err := d.Write(ctx, off, p); err != nil {
			return err
		}
	}
	if _, err := w.Commit(ctx, store.Point{Consistency: store.Crash, Disks: []store.Disk{{Name: "disk0"}}}); err != nil {
		return err
	}
	return b.open(ctx, func(_ *restore.Catalog, _ *restore.PointDetails, disk restore.Disk) error {
		_, err := restore.WriteTo(ctx, disk, b.raw, restore.WriteOptions{})
		return err
	})
}

// open opens the repository and its point's disk for the time of f.
func (b *bench) open(ctx context.Context, f func(*restore.Catalog, *restore.PointDetails, restore.Disk) error) (err error) {
	repo, err := store.Open(ctx, b.repo)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	cat := restore.NewCatalog(repo, restore.NewCache(256<<20))
	p, err := cat.Find(ctx, "bench")
	if err != nil {
		return err
	}
	d, closer, err := cat.Open(ctx, p, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	return f(cat, p, d)
}

// boot runs a machine to the guest's last word.
func (b *bench) boot(ctx context.Context, disk vm.Backing) error {
	console := vm.NewBootWatch()
	m, err := vm.StartMachine(ctx, vm.MachineOptions{Config: b.machine, Disks: map[string]vm.Backing{"disk0": disk}, Accel: b.accel, Console: console})
	if err != nil {
		return err
	}
	defer m.Kill()
	r, err := vm.CheckBoot(ctx, m, console, vm.CheckOptions{Expect: b.expect})
	if err == nil && r.Verdict != vm.Booted {
		err = fmt.Errorf("%s: %s\n%s", r.Verdict, r.Reason, r.Console)
	}
	return err
}

// bootPoint boots the point, as `tidemark boot` does.
func (b *bench) bootPoint(ctx context.Context) error {
	return b.open(ctx, func(cat *restore.Catalog, p *restore.PointDetails, base restore.Disk) (err error) {
		overlay := filepath.Join(b.dir, "overlay")
		o, err := restore.CreateOverlay(overlay, base, cat.Identity(p, 0))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, o.Close(), os.Remove(overlay)) }()
		set, err := nbd.NewStatic(nbd.Export{Name: "disk0", Disk: restore.NewHydratable(o)})
		if err != nil {
			return err
		}
		socket := filepath.Join(b.dir, "nbd")
		l, err := nbd.Listen(ctx, "unix", socket)
		if err != nil {
			return err
		}
		serve, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- (&nbd.Server{Exports: set, Log: slog.New(slog.DiscardHandler)}).Serve(serve, l) }()
		err = b.boot(ctx, vm.Backing{NBD: socket, Export: "disk0"})
		stop()
		return errors.Join(err, <-done)
	})
}

// bootFile boots the restored file. It is writable, and the guest that only looks writes nothing to it.
func (b *bench) bootFile(ctx context.Context) error {
	return b.boot(ctx, vm.Backing{File: b.raw})
}

type result struct {
	OverNBD  []float64        `json:"over_nbd_s"`
	FromFile []float64        `json:"from_file_s"`
	Ratio    float64          `json:"ratio_of_medians"`
	Interval measure.Interval `json:"ratio"`
	Accel    string           `json:"accel"`
	Host     measure.Host     `json:"host"`
}

func (b *bench) measure(ctx context.Context, host measure.Host) error {
	sides := []struct {
		boot func(context.Context) error
		took *measure.Sample
	}{{b.bootPoint, &b.overNBD}, {b.bootFile, &b.fromFile}}
	for round := range b.o.rounds {
		for _, i := range measure.Turns(len(sides), round) {
			begin := time.Now()
			if err := sides[i].boot(ctx); err != nil {
				return err
			}
			*sides[i].took = append(*sides[i].took, time.Since(begin).Seconds())
		}
	}
	r := result{
		OverNBD: b.overNBD, FromFile: b.fromFile, Ratio: b.overNBD.Median() / b.fromFile.Median(),
		Interval: measure.Ratio(b.overNBD, b.fromFile), Accel: b.accel, Host: host,
	}
	if b.o.json {
		return measure.WriteJSON(os.Stdout, r)
	}
	fmt.Printf("%s, %s, %d boots each, in turns\n\n", host, b.accel, b.o.rounds)
	for _, s := range []struct {
		name string
		took measure.Sample
	}{{"over NBD, from the repository", b.overNBD}, {"restored raw file", b.fromFile}} {
		fmt.Printf("%-32s median %6.2f s   %6.2f to %6.2f\n", s.name, s.took.Median(), s.took.Min(), s.took.Max())
	}
	fmt.Printf("%-32s %.3f\n", "ratio of the medians", r.Ratio)
	return nil
}
