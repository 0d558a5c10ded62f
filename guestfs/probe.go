package guestfs

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"io"
	"strings"
)

// probeBytes is how far the signatures reach: btrfs' superblock is the last.
const probeBytes = 64<<10 + 4096

// Kinds that have no tree of files, and why.
var noTree = map[string]string{
	"luks":      "LUKS: needs a key",
	"bitlocker": "BitLocker: needs a key",
	"swap":      "swap space, no files",
	"lvm":       "LVM physical volume: LVM inside a guest is not read",
	"md":        "member of a Linux RAID: RAID inside a guest is not read",
	"jbd":       "external journal, no files",
	"unknown":   "no signature of a file system that is known",
}

// Probe looks for the signature of a file system in the first bytes of r, and fills Kind, State, Label, UUID and Why. An
// error is one of reading. Offsets are those of the kernel's headers and of libblkid.
func Probe(r io.ReaderAt, size int64) (Volume, error) {
	head := make([]byte, min(size, probeBytes))
	if _, err := r.ReadAt(head, 0); err != nil && err != io.EOF {
		return Volume{}, err
	}
	v := probe(head)
	v.Size = size
	v.Why = noTree[v.Kind]
	switch v.Kind {
	case "luks", "bitlocker", "swap", "lvm", "md", "jbd", "unknown":
		v.State = NotFiles
	}
	return v, nil
}

// head of a volume; what lies behind its end reads as zero.
type head []byte

func (h head) bytes(off, n int) []byte {
	b := make([]byte, n)
	if off < len(h) {
		copy(b, h[off:])
	}
	return b
}

func (h head) is(off int, magic string) bool { return string(h.bytes(off, len(magic))) == magic }
func (h head) le16(off int) uint16           { return binary.LittleEndian.Uint16(h.bytes(off, 2)) }
func (h head) le32(off int) uint32           { return binary.LittleEndian.Uint32(h.bytes(off, 4)) }
func (h head) le64(off int) uint64           { return binary.LittleEndian.Uint64(h.bytes(off, 8)) }

func (h head) text(off, n int) string {
	b, _, _ := bytes.Cut(h.bytes(off, n), []byte{0})
	return strings.TrimRight(strings.ToValidUTF8(string(b), "?"), " ")
}

func (h head) uuid(off int) string {
	s := hex.EncodeToString(h.bytes(off, 16))
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

func state(dirty bool) string {
	if dirty {
		return Dirty
	}
	return Clean
}

func probe(h head) Volume {
	switch {
	case h.is(0, "LUKS\xba\xbe"):
		return Volume{Kind: "luks", UUID: h.text(168, 36)}
	case h.isPV():
		return Volume{Kind: "lvm"}
	case h.le32(4096) == 0xa92b4efc, h.le32(0) == 0xa92b4efc:
		return Volume{Kind: "md"}
	case h.is(0x10040, "_BHRfS_M"):
		// A log tree is there after fsync, until the next commit.
		return Volume{Kind: "btrfs", UUID: h.uuid(0x10020), Label: h.text(0x1012b, 256), State: state(h.le64(0x10060) != 0)}
	case h.is(0, "XFSB"):
		return Volume{Kind: "xfs", UUID: h.uuid(32), Label: h.text(108, 12)}
	case h.le16(1024+0x38) == 0xef53:
		return h.ext()
	case h.is(3, "NTFS    "):
		return Volume{Kind: "ntfs"}
	case h.is(3, "EXFAT   "):
		return Volume{Kind: "exfat", State: state(h.le16(106)&2 != 0)}
	case h.is(3, "-FVE-FS-"):
		return Volume{Kind: "bitlocker"}
	case h.is(4086, "SWAPSPACE2"), h.is(4086, "SWAP-SPACE"):
		return Volume{Kind: "swap", UUID: h.uuid(1036), Label: h.text(1052, 16)}
	case h.is(32769, "CD001"):
		return Volume{Kind: "iso9660", Label: h.text(32808, 32)}
	case h.le16(510) == 0xaa55 && h.is(82, "FAT32   "):
		return Volume{Kind: "vfat", Label: h.text(71, 11), State: state(h.bytes(65, 1)[0]&1 != 0)}
	case h.le16(510) == 0xaa55 && (h.is(54, "FAT12   ") || h.is(54, "FAT16   ") || h.is(54, "FAT     ")):
		return Volume{Kind: "vfat", Label: h.text(43, 11), State: state(h.bytes(37, 1)[0]&1 != 0)}
	}
	return Volume{Kind: "unknown"}
}

// isPV finds the label of an LVM physical volume, in one of the first four sectors.
func (h head) isPV() bool {
	for off := 0; off < 4*512; off += 512 {
		if h.is(off, "LABELONE") && h.is(off+24, "LVM2 001") {
			return true
		}
	}
	return false
}

// Features of ext2, ext3 and ext4 (fs/ext4/ext4.h).
const (
	extHasJournal  = 0x4  // compatible
	extRecover     = 0x4  // incompatible
	extJournalDev  = 0x8  //
	extIncompatOf3 = 0x16 // filetype, recover, meta_bg
	extROCompatOf3 = 0x7  // sparse_super, large_file, btree_dir
	extValid       = 0x1  // s_state: cleanly unmounted
	extErrors      = 0x2  // s_state: errors were found
)

func (h head) ext() Volume {
	const s = 1024
	compat, incompat, ro := h.le32(s+0x5c), h.le32(s+0x60), h.le32(s+0x64)
	v := Volume{Kind: "ext2", UUID: h.uuid(s + 0x68), Label: h.text(s+0x78, 16)}
	switch {
	case incompat&extJournalDev != 0:
		v.Kind = "jbd"
		return v
	case incompat&^extIncompatOf3 != 0 || ro&^extROCompatOf3 != 0:
		v.Kind = "ext4"
	case compat&extHasJournal != 0:
		v.Kind = "ext3"
	}
	st := h.le16(s + 0x3a)
	v.State = state(incompat&extRecover != 0 || st&extValid == 0 || st&extErrors != 0)
	return v
}
