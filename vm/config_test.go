package vm_test

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/vm"
)

func webServer() vm.Config {
	return vm.Config{
		Version:  vm.FormatVersion,
		Name:     "Web Server, 01",
		CPUs:     2,
		Memory:   256 << 20,
		Firmware: vm.Firmware{Type: vm.BIOS},
		Disks: []vm.Disk{
			{Name: "disk0", Bus: vm.Virtio, Serial: "a,b"},
			{Name: "disk1", Bus: vm.SCSI},
			{Name: "disk2", Bus: vm.SATA},
			{Name: "disk3", Bus: vm.NVMe},
		},
		NICs:   []vm.NIC{{Name: "nic0", MAC: "52:54:00:ab:cd:01", Model: "virtio", Network: "default"}},
		Boot:   []string{"disk1", "nic0"},
		Clock:  vm.LocalTime,
		Source: &vm.Source{Format: "libvirt-xml", Definition: []byte("<domain>\x00\xff</domain>")},
	}
}

func TestEncodedConfigDecodesToTheSame(t *testing.T) {
	want := webServer()
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := vm.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*got, want) {
		t.Fatalf("got %+v\nwant %+v", *got, want)
	}
}

func TestValidateFindsWhatIsWrong(t *testing.T) {
	for name, spoil := range map[string]func(*vm.Config){
		"name":            func(c *vm.Config) { c.Name = "a/b" },
		"name dots":       func(c *vm.Config) { c.Name = ".." },
		"no name":         func(c *vm.Config) { c.Name = "" },
		"CPUs":            func(c *vm.Config) { c.CPUs = 0 },
		"memory":          func(c *vm.Config) { c.Memory = 1<<20 + 1 },
		"firmware":        func(c *vm.Config) { c.Firmware.Type = "openfirmware" },
		"kernel for BIOS": func(c *vm.Config) { c.Firmware.Kernel = "/vmlinuz" },
		"no kernel":       func(c *vm.Config) { c.Firmware.Type = vm.Kernel },
		"bus":             func(c *vm.Config) { c.Disks[0].Bus = "floppy" },
		"serial":          func(c *vm.Config) { c.Disks[0].Serial = "with space" },
		"same name twice": func(c *vm.Config) { c.Disks[1].Name = "nic0" },
		"MAC":             func(c *vm.Config) { c.NICs[0].MAC = "52:54:00:12:34" },
		"group MAC":       func(c *vm.Config) { c.NICs[0].MAC = "01:00:5e:00:00:01" },
		"same MAC twice": func(c *vm.Config) {
			c.NICs = append(c.NICs, vm.NIC{Name: "nic1", MAC: "52-54-00-ab-cd-01", Model: "e1000"})
		},
		"model":             func(c *vm.Config) { c.NICs[0].Model = "ne2000" },
		"boot from nowhere": func(c *vm.Config) { c.Boot = []string{"disk9"} },
		"boot twice":        func(c *vm.Config) { c.Boot = []string{"disk0", "disk0"} },
		"clock":             func(c *vm.Config) { c.Clock = "sundial" },
		"source":            func(c *vm.Config) { c.Source.Format = "" },
	} {
		t.Run(name, func(t *testing.T) {
			c := webServer()
			spoil(&c)
			if err := c.Validate(); !errors.Is(err, vm.ErrInvalid) {
				t.Fatalf("got %v, want ErrInvalid", err)
			}
			if _, err := c.Encode(); !errors.Is(err, vm.ErrInvalid) {
				t.Fatalf("Encode: got %v, want ErrInvalid", err)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	c := webServer()
	good, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	edit := func(old, changed string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("no %q in %s", old, good)
		}
		return bytes.Replace(good, []byte(old), []byte(changed), 1)
	}
	for name, test := range map[string]struct {
		in   []byte
		want error
	}{
		"nothing":                    {nil, vm.ErrInvalid},
		"half":                       {good[:len(good)/2], vm.ErrInvalid},
		"two":                        {append(bytes.Clone(good), good...), vm.ErrInvalid},
		"newer version":              {edit(`"version": 1`, `"version": 2, "quantum": true`), vm.ErrVersion},
		"unknown field":              {edit(`"cpus": 2`, `"cpus": 2, "gpus": 1`), vm.ErrInvalid},
		"what Validate would refuse": {edit(`"cpus": 2`, `"cpus": -2`), vm.ErrInvalid},
		"huge":                       {[]byte(strings.Repeat(" ", vm.MaxEncoded+1)), vm.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := vm.Decode(test.in); !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	c := webServer()
	b, err := c.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:100])
	f.Add([]byte(`{"version":1,"name":"x","cpus":1,"memory":1048576,"firmware":{"type":"kernel","kernel":"/k"},"clock":"utc"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := vm.Decode(b)
		if err != nil {
			if !errors.Is(err, vm.ErrInvalid) && !errors.Is(err, vm.ErrVersion) {
				t.Fatalf("error of no known kind: %v", err)
			}
			return
		}
		once, err := c.Encode()
		if err != nil {
			if len(b) > vm.MaxEncoded/8 {
				return // indented, it may be longer than allowed
			}
			t.Fatalf("decoded, but does not encode: %v", err)
		}
		again, err := vm.Decode(once)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := again.Encode(); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%s\nbecame %s (%v)", once, twice, err)
		}
	})
}
