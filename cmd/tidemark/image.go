package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// formats of image files that are no raw disk, by what stands at an offset.
var formats = []struct {
	name  string
	off   int64
	magic string
}{
	{"qcow2", 0, "QFI\xfb"},
	{"QED", 0, "QED\x00"},
	{"VMDK", 0, "KDMV"},
	{"VMDK", 0, "COWD"},
	{"VMDK", 0, "# Disk DescriptorFile"},
	{"VHDX", 0, "vhdxfile"},
	{"VHD", 0, "conectix"},
	{"VDI", 0x40, "\x7f\x10\xda\xbe"},
	{"Parallels", 0, "WithoutFreeSpace"},
	{"Parallels", 0, "WithouFreSpacExt"},
}

// errFormat is wrapped when an image file is no raw disk.
var errFormat = errors.New("not a raw image")

// rawImage refuses images in a format of some hypervisor: their bytes are not the disk's.
func rawImage(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	head := make([]byte, 0x48)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for _, k := range formats {
		if k.off <= int64(n) && bytes.HasPrefix(head[k.off:n], []byte(k.magic)) {
			return fmt.Errorf("%s: %w but %s: attach it with `qemu-nbd -c /dev/nbd0 %s` and let the VM use that device, or convert it to raw", path, errFormat, k.name, path)
		}
	}
	return nil
}

// image opens the source of an image file: tracked where that can be done, else compared.
func (s sources) image(path string) (cbt.Source, error) {
	if err := rawImage(path); err != nil {
		return nil, err
	}
	t, err := s.trackFile(path)
	switch {
	case err == nil:
		return t, nil
	case errors.Is(err, bpf.ErrNoFileHooks), errors.Is(err, bpf.ErrUntrackable), errors.Is(err, bpf.ErrPermission), errors.Is(err, bpf.ErrNoBTF):
		return cbt.OpenUntracked(path, err.Error())
	}
	return nil, err
}

// trackFile tracks an image file, or says why it can't be.
func (s sources) trackFile(path string) (*tracked, error) {
	f, err := bpf.LookupFile(path)
	if err != nil {
		return nil, err
	}
	// Nothing is attached for a file that can't be tracked.
	if err := bpf.CanTrackFiles(f.FS); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s.attach(path)
}
