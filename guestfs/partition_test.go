package guestfs

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tidemark/tidemark/restore/disktest"
)

// sfdiskTable is what sfdisk --json says.
type sfdiskTable struct {
	PartitionTable struct {
		Label      string
		SectorSize int64
		Partitions []struct {
			Node, Type, Name string
			Start, Size      int64
		}
	}
}

// written makes a disk of 64 MiB with the table that script tells sfdisk, and what sfdisk reads from it.
func written(t *testing.T, script string) (disktest.Bytes, []Partition) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 64<<20); err != nil {
		t.Fatal(err)
	}
	sfdisk, err := exec.LookPath("sfdisk")
	if err != nil {
		if sfdisk, err = exec.LookPath("/usr/sbin/sfdisk"); err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
	}
	cmd := exec.Command(sfdisk, "--quiet", path)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	out, err := exec.Command(sfdisk, "--json", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var table sfdiskTable
	if err := json.Unmarshal(out, &table); err != nil {
		t.Fatal(err)
	}
	var want []Partition
	for _, p := range table.PartitionTable.Partitions {
		n := 0
		if _, err := fmt.Sscanf(strings.TrimPrefix(p.Node, path), "%d", &n); err != nil {
			t.Fatal(p.Node, err)
		}
		w := Partition{Number: n, Name: p.Name, Off: p.Start * 512, Len: p.Size * 512}
		if table.PartitionTable.Label == "gpt" {
			w.Type = strings.ToLower(p.Type)
		} else {
			var kind byte
			if _, err := fmt.Sscanf(p.Type, "%x", &kind); err != nil {
				t.Fatal(err)
			}
			if kind == 0x05 || kind == 0x0f || kind == 0x85 {
				continue // what it holds counts
			}
			w.Type = fmt.Sprintf("0x%02x", kind)
		}
		want = append(want, w)
	}
	disk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return disk, want
}

const (
	gptScript = `label: gpt
size=1MiB, type=U, name="EFI system"
size=20MiB, type=L, name="wörzel-日本"
start=40MiB, size=3MiB, type=S
`
	mbrScript = `label: dos
size=8MiB, type=83, bootable
size=4MiB, type=82
size=30MiB, type=5
size=2MiB, type=7
size=5MiB, type=83
size=3MiB, type=8e
size=1MiB, type=c
`
)

func TestTablesThatSfdiskWrites(t *testing.T) {
	for name, script := range map[string]string{
		"gpt": gptScript, "mbr": mbrScript, "gpt, no partitions": "label: gpt\n", "mbr, no partitions": "label: dos\n",
		"gpt, gaps": "label: gpt\n128: size=1MiB, type=L\n7: size=2MiB, type=L\n",
	} {
		t.Run(name, func(t *testing.T) {
			disk, want := written(t, script)
			got, err := Partitions(t.Context(), disk)
			byNumber := func(a, b Partition) int { return a.Number - b.Number }
			slices.SortFunc(got, byNumber)
			slices.SortFunc(want, byNumber)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("got %+v, %v\nwant %+v", got, err, want)
			}
			if strings.Count(script, "size=") > 0 && len(want) == 0 {
				t.Error("sfdisk has made nothing")
			}
		})
	}
}

func TestBackupTable(t *testing.T) {
	disk, want := written(t, gptScript)
	for name, at := range map[string]int{"header": 512 + 24, "entries": 1024 + 40} {
		t.Run(name, func(t *testing.T) {
			d := bytes.Clone(disk)
			d[at] ^= 1
			if got, err := Partitions(t.Context(), disktest.Bytes(d)); err != nil || !slices.Equal(got, want) {
				t.Errorf("with the first table damaged: got %+v, %v\nwant %+v", got, err, want)
			}
			d[len(d)-512+24] ^= 1
			if got, err := Partitions(t.Context(), disktest.Bytes(d)); !errors.Is(err, ErrTable) || got != nil {
				t.Errorf("with both damaged: got %+v, %v, want ErrTable", got, err)
			}
		})
	}
}

// makeGPT makes a disk of the given number of units with a table in its first units.
func makeGPT(units, unit int, parts ...[2]uint64) []byte {
	disk := make([]byte, units*unit)
	protect(disk)
	le := binary.LittleEndian
	table := disk[2*unit:][:len(parts)*gptEntrySize]
	for i, p := range parts {
		e := table[i*gptEntrySize:]
		e[0] = 1
		le.PutUint64(e[32:], p[0])
		le.PutUint64(e[40:], p[1])
	}
	h := disk[unit:][:gptHeaderSize]
	copy(h, gptSignature)
	le.PutUint32(h[12:], gptHeaderSize)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], uint32(len(parts)))
	le.PutUint32(h[84:], gptEntrySize)
	sumGPT(disk, unit)
	return disk
}

// protect writes an MBR that tells of a GPT.
func protect(disk []byte) {
	disk[mbrEntries+4] = mbrProtective
	binary.LittleEndian.PutUint32(disk[mbrEntries+8:], 1)
	binary.LittleEndian.PutUint32(disk[mbrEntries+12:], 0xffffffff)
	copy(disk[510:], mbrSignature)
}

// sumGPT sets the checksums of the first table.
func sumGPT(disk []byte, unit int) {
	le := binary.LittleEndian
	h := disk[unit:][:gptHeaderSize]
	if n := uint64(le.Uint32(h[80:])) * uint64(le.Uint32(h[84:])); n <= uint64(len(disk)-2*unit) {
		le.PutUint32(h[88:], crc32.ChecksumIEEE(disk[2*unit:][:n]))
	}
	le.PutUint32(h[16:], 0)
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
}

func TestGPTOfLargeSectors(t *testing.T) {
	got, err := Partitions(t.Context(), disktest.Bytes(makeGPT(100, 4096, [2]uint64{10, 19}, [2]uint64{30, 30})))
	if err != nil || len(got) != 2 || got[0].Off != 40960 || got[0].Len != 40960 || got[1].Off != 30*4096 || got[1].Len != 4096 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestPartitionsThatLeaveTheDisk(t *testing.T) {
	const max = 1<<64 - 1
	disk := makeGPT(100, 512, [2]uint64{10, 19}, [2]uint64{200, 300}, [2]uint64{50, max}, [2]uint64{20, 10}, [2]uint64{0, max}, [2]uint64{max, max}, [2]uint64{max - 1, max - 1})
	got, err := Partitions(t.Context(), disktest.Bytes(disk))
	if !errors.Is(err, ErrTable) || len(got) != 1 || got[0].Off != 5120 || got[0].Len != 5120 {
		t.Errorf("got %+v, %v, want the first and ErrTable", got, err)
	}
	disk = makeGPT(100, 512, [2]uint64{90, 200})
	if got, err := Partitions(t.Context(), disktest.Bytes(disk)); err != nil || len(got) != 1 || got[0].Len != 5120 {
		t.Errorf("got %+v, %v, want one that is cut to the disk's end", got, err)
	}
}

func TestLogicalPartitionsWithoutAnEnd(t *testing.T) {
	disk, want := written(t, mbrScript)
	// The last sector of the chain links to the first.
	ext := int64(binary.LittleEndian.Uint32(disk[mbrEntries+2*16+8:])) * 512
	at := ext
	for {
		link := disk[at+mbrEntries+16:]
		if binary.LittleEndian.Uint32(link[12:]) == 0 {
			link[4] = 5
			binary.LittleEndian.PutUint32(link[8:], 0)
			binary.LittleEndian.PutUint32(link[12:], 1)
			break
		}
		at = ext + int64(binary.LittleEndian.Uint32(link[8:]))*512
	}
	got, err := Partitions(t.Context(), disk)
	slices.SortFunc(got, func(a, b Partition) int { return a.Number - b.Number })
	if !errors.Is(err, ErrTable) || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v\nwant %+v and ErrTable", got, err, want)
	}
}

func TestNoTable(t *testing.T) {
	fat := make([]byte, 1<<20)
	copy(fat[510:], mbrSignature)
	copy(fat[mbrEntries:], "This is not a bootable disk.")
	for name, disk := range map[string]disktest.Bytes{"empty": {}, "one byte": {1}, "zeroes": make([]byte, 1<<20), "file system with a boot sector": fat} {
		if got, err := Partitions(t.Context(), disk); err != nil || got != nil {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
}

// FuzzPartitions makes disks of a head and an end, and keeps the promises of [Partitions]. fix
// gives the first table right checksums, without which nothing behind them would be seen.
func FuzzPartitions(f *testing.F) {
	f.Add(makeGPT(8, 512, [2]uint64{3, 6}), []byte{}, true)
	f.Add(makeGPT(4, 4096, [2]uint64{3, 3}), []byte{}, false)
	mbr := make([]byte, 2048)
	copy(mbr[510:], mbrSignature)
	copy(mbr[1022:], mbrSignature)
	mbr[mbrEntries+4], mbr[mbrEntries+8], mbr[mbrEntries+12] = 5, 1, 3
	mbr[512+mbrEntries+4], mbr[512+mbrEntries+8], mbr[512+mbrEntries+12] = 0x83, 1, 1
	mbr[512+mbrEntries+20], mbr[512+mbrEntries+24], mbr[512+mbrEntries+28] = 5, 2, 1
	f.Add(mbr, []byte{}, false)
	f.Fuzz(func(t *testing.T, head, end []byte, fix bool) {
		if len(head) > 1<<16 || len(end) > 1<<16 {
			return
		}
		disk := append(append(bytes.Clone(head), make([]byte, 4096)...), end...)
		if fix && len(disk) >= 2048 {
			protect(disk)
			copy(disk[512:], gptSignature)
			binary.LittleEndian.PutUint32(disk[512+12:], gptHeaderSize)
			binary.LittleEndian.PutUint64(disk[512+24:], 1)
			binary.LittleEndian.PutUint64(disk[512+72:], 2)
			sumGPT(disk, 512)
		}
		parts, err := Partitions(t.Context(), disktest.Bytes(disk))
		if err != nil && !errors.Is(err, ErrTable) {
			t.Errorf("error of reading: %v", err)
		}
		if len(parts) > 4*maxLogical*4 && !isProtective(disk) {
			t.Errorf("%d partitions", len(parts))
		}
		seen := map[int]bool{}
		for _, p := range parts {
			if p.Off < 0 || p.Len <= 0 || p.Off > int64(len(disk))-p.Len || p.Number < 1 || seen[p.Number] || p.Type == "" {
				t.Errorf("partition %+v of a disk of %d bytes", p, len(disk))
			}
			seen[p.Number] = true
		}
	})
}
