package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"unicode"
	"unicode/utf8"
)

// FormatVersion is the version of the JSON form that Encode writes.
const FormatVersion = 1

// MaxEncoded bounds the JSON form in bytes. Most of it is the raw definition.
const MaxEncoded = 4 << 20

var (
	// ErrVersion is wrapped when a configuration was written by a newer program.
	ErrVersion = errors.New("unknown version of the VM configuration")

	// ErrInvalid is wrapped when a configuration contradicts itself or the
	// limits, or is not one at all.
	ErrInvalid = errors.New("invalid VM configuration")
)

// Config is a virtual machine, without the place of its disks.
type Config struct {
	Version  int      `json:"version"` // FormatVersion
	Name     string   `json:"name"`    // printable, without "/", at most 128 bytes
	CPUs     int      `json:"cpus"`    // 1 to 4096
	Memory   int64    `json:"memory"`  // bytes, a multiple of 1 MiB, up to 64 TiB
	Firmware Firmware `json:"firmware"`
	Disks    []Disk   `json:"disks,omitempty"`
	NICs     []NIC    `json:"nics,omitempty"`
	Boot     []string `json:"boot,omitempty"` // names of disks and NICs, first to last; empty: the firmware's choice
	Clock    Clock    `json:"clock"`
	Source   *Source  `json:"source,omitempty"`
}

// FirmwareType says what the machine runs first.
type FirmwareType string

// Types of firmware. Kernel stands for machines whose hypervisor loads the
// kernel itself, such as Firecracker's.
const (
	BIOS   FirmwareType = "bios"
	UEFI   FirmwareType = "uefi"
	Kernel FirmwareType = "kernel"
)

// Firmware of a machine. The paths are the host's, and set for Kernel alone.
type Firmware struct {
	Type        FirmwareType `json:"type"`
	Kernel      string       `json:"kernel,omitempty"`
	Initrd      string       `json:"initrd,omitempty"`
	CommandLine string       `json:"command_line,omitempty"`
}

// Bus is what the guest sees a disk at.
type Bus string

// Buses of disks.
const (
	Virtio Bus = "virtio" // virtio-blk
	SCSI   Bus = "scsi"   // virtio-scsi
	SATA   Bus = "sata"   // AHCI
	NVMe   Bus = "nvme"
)

// Disk of a machine.
type Disk struct {
	Name   string `json:"name"` // as in the restore point, "disk0"; unique among disks and NICs
	Bus    Bus    `json:"bus"`
	Serial string `json:"serial,omitempty"` // up to 20 printable ASCII characters
}

// NIC is a network card.
type NIC struct {
	Name    string `json:"name"`              // "nic0"; unique among disks and NICs
	MAC     string `json:"mac"`               // "52:54:00:12:34:56", not a group address
	Model   string `json:"model"`             // "virtio", "e1000" or "e1000e"
	Network string `json:"network,omitempty"` // the source's name for what it is connected to
}

// Clock says what the machine's hardware clock shows.
type Clock string

// Kinds of clock.
const (
	UTC       Clock = "utc"
	LocalTime Clock = "localtime"
)

// Source is the definition that the configuration was made from, kept so that
// nothing is lost that has no place above.
type Source struct {
	Format     string `json:"format"`     // "libvirt-xml", "qemu-arguments", ...
	Definition []byte `json:"definition"` // verbatim
}

// Validate checks that c can be encoded and makes sense. The error lists all
// that is wrong and wraps ErrInvalid or ErrVersion.
func (c *Config) Validate() error {
	if c.Version != FormatVersion {
		return fmt.Errorf("%w: %d, this program knows %d", ErrVersion, c.Version, FormatVersion)
	}
	var wrong []string
	check := func(ok bool, format string, args ...any) {
		if !ok {
			wrong = append(wrong, fmt.Sprintf(format, args...))
		}
	}
	check(validName(c.Name), "name %q is empty, too long, or has a slash or unprintable characters", c.Name)
	check(c.CPUs >= 1 && c.CPUs <= 4096, "%d CPUs", c.CPUs)
	check(c.Memory >= 1<<20 && c.Memory <= 64<<40 && c.Memory%(1<<20) == 0, "memory of %d bytes", c.Memory)

	f := c.Firmware
	switch f.Type {
	case BIOS, UEFI:
		check(f.Kernel == "" && f.Initrd == "" && f.CommandLine == "", "firmware %q with a kernel", f.Type)
	case Kernel:
		check(f.Kernel != "", "firmware %q without a kernel", f.Type)
	default:
		check(false, "firmware %q", f.Type)
	}
	for _, s := range []string{f.Kernel, f.Initrd, f.CommandLine} {
		check(utf8.ValidString(s) && !strings.ContainsRune(s, 0), "firmware has text with bytes that cannot be passed on")
	}

	names := map[string]bool{}
	named := func(name string) {
		check(validName(name), "device name %q", name)
		check(!names[name], "two devices named %q", name)
		names[name] = true
	}
	for _, d := range c.Disks {
		named(d.Name)
		switch d.Bus {
		case Virtio, SCSI, SATA, NVMe:
		default:
			check(false, "%s: bus %q", d.Name, d.Bus)
		}
		check(len(d.Serial) <= 20 && strings.IndexFunc(d.Serial, func(r rune) bool { return r < '!' || r > '~' }) < 0,
			"%s: serial %q", d.Name, d.Serial)
	}
	macs := map[string]bool{}
	for _, n := range c.NICs {
		named(n.Name)
		mac, err := net.ParseMAC(n.MAC)
		check(err == nil && len(mac) == 6 && mac[0]&1 == 0, "%s: MAC %q", n.Name, n.MAC)
		check(!macs[mac.String()], "two NICs with MAC %s", n.MAC)
		macs[mac.String()] = true
		switch n.Model {
		case "virtio", "e1000", "e1000e":
		default:
			check(false, "%s: model %q", n.Name, n.Model)
		}
		check(utf8.ValidString(n.Network), "%s: network %q", n.Name, n.Network)
	}
	booted := map[string]bool{}
	for _, b := range c.Boot {
		check(names[b] && !booted[b], "boot order names %q, which is no device or was named before", b)
		booted[b] = true
	}
	check(c.Clock == UTC || c.Clock == LocalTime, "clock %q", c.Clock)
	if c.Source != nil {
		check(c.Source.Format != "" && utf8.ValidString(c.Source.Format), "source of format %q", c.Source.Format)
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%w: %s", ErrInvalid, strings.Join(wrong, "; "))
	}
	return nil
}

func validName(s string) bool {
	return s != "" && s != "." && s != ".." && len(s) <= 128 && utf8.ValidString(s) &&
		strings.IndexFunc(s, func(r rune) bool { return r == '/' || !unicode.IsPrint(r) }) < 0
}

// Encode returns the JSON form of a valid configuration.
func (c *Config) Encode() ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	b = append(b, '\n')
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("%w: %d bytes are more than %d", ErrInvalid, len(b), MaxEncoded)
	}
	return b, nil
}

// Decode reads what Encode has written and validates it. Fields that this
// version does not have are an error: ignoring them could lose a device.
func Decode(b []byte) (*Config, error) {
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("%w: %d bytes are more than %d", ErrInvalid, len(b), MaxEncoded)
	}
	// The version first: a newer one may have fields that look wrong to us.
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if v.Version != FormatVersion {
		return nil, fmt.Errorf("%w: %d, this program knows %d", ErrVersion, v.Version, FormatVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	c := new(Config)
	if err := dec.Decode(c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: something follows it", ErrInvalid)
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return c, nil
}
