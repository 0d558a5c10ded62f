package kernel

import (
	"errors"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// driver plays the kernel: the family is there, and answer answers the commands.
func driver(t *testing.T, answer genltest.Func) *control {
	t.Helper()
	f := genetlink.Family{ID: 99, Version: 1, Name: familyName, Groups: []genetlink.MulticastGroup{{ID: 7, Name: groupName}}}
	c, err := newControl(genltest.Dial(genltest.ServeFamily(f, answer)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// attributes are the top level of a message.
func attributes(t testing.TB, p []byte) map[uint16][]byte {
	t.Helper()
	list, err := netlink.UnmarshalAttributes(p)
	if err != nil {
		t.Fatal(err)
	}
	all := map[uint16][]byte{}
	for _, a := range list {
		all[a.Type&^(netlink.Nested|netlink.NetByteOrder)] = a.Data
	}
	return all
}

func encode(t testing.TB, fill func(*netlink.AttributeEncoder)) []byte {
	t.Helper()
	e := netlink.NewAttributeEncoder()
	fill(e)
	b, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func status(t testing.TB, devices map[uint32]uint8) []byte {
	return encode(t, func(e *netlink.AttributeEncoder) {
		e.Nested(attrDeviceList, func(list *netlink.AttributeEncoder) error {
			for _, index := range slices.Sorted(maps.Keys(devices)) {
				list.Nested(attrDeviceItem, func(item *netlink.AttributeEncoder) error {
					item.Uint32(attrDeviceIndex, index)
					item.Uint8(attrDeviceConnected, devices[index])
					return nil
				})
			}
			return nil
		})
	})
}

// TestConnectSaysAll checks the message that attaches a device, number by number: the kernel ignores what it
// does not know.
func TestConnectSaysAll(t *testing.T) {
	file := os.Stdin
	c := driver(t, func(g genetlink.Message, _ netlink.Message) ([]genetlink.Message, error) {
		if g.Header.Command != 1 || g.Header.Version != 1 {
			t.Errorf("%+v", g.Header)
		}
		a := attributes(t, g.Data)
		for kind, want := range map[uint16][]byte{
			1: {3, 0, 0, 0}, 2: {0, 0, 1, 0, 0, 0, 0, 0}, 3: {0, 2, 0, 0, 0, 0, 0, 0}, 4: {2, 0, 0, 0, 0, 0, 0, 0},
			5: {5, 1, 0, 0, 0, 0, 0, 0}, 8: {60, 0, 0, 0, 0, 0, 0, 0}, 10: []byte("name\x00"),
		} {
			if !slices.Equal(a[kind], want) {
				t.Errorf("attribute %d is %v, want %v", kind, a[kind], want)
			}
		}
		fds, err := netlink.UnmarshalAttributes(a[7])
		if err != nil || len(fds) != 2 {
			t.Errorf("sockets: %v, %v", fds, err)
		}
		for _, fd := range fds {
			if got := attributes(t, fd.Data)[1]; fd.Type&^netlink.Nested != 1 || !slices.Equal(got, []byte{0, 0, 0, 0}) {
				t.Errorf("socket: %v", fd)
			}
		}
		return []genetlink.Message{{Data: encode(t, func(e *netlink.AttributeEncoder) { e.Uint32(attrIndex, 3) })}}, nil
	})
	got, err := c.connect(setup{index: 3, sockets: []*os.File{file, file}, size: 1 << 16, blockSize: 512, flags: 0x105,
		timeout: 1500 * time.Millisecond, deadConn: time.Minute, backend: "name"})
	if err != nil || got != 3 {
		t.Fatal(got, err)
	}
}

func TestControlErrors(t *testing.T) {
	failing := func(e unix.Errno) *control {
		return driver(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			return nil, genltest.Error(int(e))
		})
	}
	if _, err := failing(unix.EBUSY).connect(setup{index: -1}); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	if _, err := failing(unix.EPERM).connect(setup{index: -1}); !errors.Is(err, ErrPermission) {
		t.Error(err)
	}
	if err := failing(unix.EINVAL).disconnect(1); !errors.Is(err, ErrNotAttached) {
		t.Error(err)
	}
	silent := driver(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return []genetlink.Message{{}}, nil
	})
	if _, err := silent.connect(setup{index: -1}); !errors.Is(err, errAnswer) {
		t.Error(err)
	}
	none := genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.ENOENT))
	})
	if _, err := newControl(none); !errors.Is(err, ErrNoDriver) {
		t.Error(err)
	}
}

func TestStatusIsOfTheDeviceAskedFor(t *testing.T) {
	c := driver(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return []genetlink.Message{{Data: status(t, map[uint32]uint8{0: 1, 1: 0, 2: 1})}}, nil
	})
	for index, want := range []bool{true, false, true, false} {
		if got, err := c.connected(index); err != nil || got != want {
			t.Errorf("%d: %v, %v", index, got, err)
		}
	}
}

func TestDeadLinks(t *testing.T) {
	index := func(cmd uint8, n uint32) genetlink.Message {
		return genetlink.Message{Header: genetlink.Header{Command: cmd}, Data: encode(t, func(e *netlink.AttributeEncoder) { e.Uint32(attrIndex, n) })}
	}
	got := deadLinks([]genetlink.Message{index(cmdLinkDead, 4), index(cmdStatus, 5), {Header: genetlink.Header{Command: cmdLinkDead}, Data: []byte{1}}, index(cmdLinkDead, 6)}, nil)
	if !slices.Equal(got, []int{4, 6}) {
		t.Error(got)
	}
	if got := deadLinks(nil, unix.ENOBUFS); !slices.Equal(got, []int{-1}) {
		t.Error(got)
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add(status(f, map[uint32]uint8{0: 1, 1: 0}))
	f.Add(encode(f, func(e *netlink.AttributeEncoder) { e.Uint32(attrIndex, 3) }))
	f.Fuzz(func(t *testing.T, p []byte) {
		m := []genetlink.Message{{Header: genetlink.Header{Command: cmdLinkDead}, Data: p}}
		if index, err := decodeIndex(m); err == nil && index < 0 {
			t.Error(index)
		}
		_, _ = decodeStatus(m)
		_ = deadLinks(m, nil)
	})
}

func TestParseDevice(t *testing.T) {
	if n, err := ParseDevice("/dev/nbd12"); n != 12 || err != nil {
		t.Error(n, err)
	}
	link := t.TempDir() + "/link"
	if err := os.Symlink("/dev/nbd3", link); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"", "nbd1", "/dev/nbd", "/dev/nbd1p1", "/dev/nbd01", "/dev/nbd-1", "/dev/sda", "/dev/nbd9999999999", link + "x"} {
		if n, err := ParseDevice(s); err == nil {
			t.Errorf("%q is %d", s, n)
		}
	}
}
