package bpf

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of include/uapi/linux/dm-ioctl.h.
const (
	dmHeader        = 312 // sizeof(struct dm_ioctl)
	dmTargetSpec    = 40  // sizeof(struct dm_target_spec)
	dmTableStatus   = 0xc138fd0c
	dmStatusTable   = 1 << 4
	dmBufferFull    = 1 << 8
	dmOffDataSize   = 12
	dmOffDataStart  = 16
	dmOffTargets    = 20
	dmOffFlags      = 28
	dmOffDev        = 40
	dmLargestBuffer = 16 << 20
)

// dmTableHash tells one table of a device-mapper device from another: with another
// table, blocks change that nobody wrote. The table may hold keys; it is only hashed.
func dmTableHash(major, minor uint32) (uint64, error) {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	for size := 16 << 10; size <= dmLargestBuffer; size *= 4 {
		b := make([]byte, size)
		le := binary.LittleEndian
		le.PutUint32(b[0:], 4) // version 4.0.0
		le.PutUint32(b[dmOffDataSize:], uint32(size))
		le.PutUint32(b[dmOffDataStart:], dmHeader)
		le.PutUint32(b[dmOffFlags:], dmStatusTable)
		le.PutUint64(b[dmOffDev:], uint64(minor&0xff|major<<8|(minor&^0xff)<<12)) // huge_encode_dev()
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), dmTableStatus, uintptr(unsafe.Pointer(&b[0])))
		if errno != 0 {
			return 0, fmt.Errorf("device-mapper table of %d:%d: %w", major, minor, errno)
		}
		if le.Uint32(b[dmOffFlags:])&dmBufferFull != 0 {
			continue
		}
		return hashTargets(b[dmHeader:], le.Uint32(b[dmOffTargets:]))
	}
	return 0, fmt.Errorf("device-mapper table of %d:%d: %w", major, minor, io.ErrShortBuffer)
}

// hashTargets reads n records: start, length, status, offset of the next, type, parameters.
func hashTargets(b []byte, n uint32) (uint64, error) {
	h := sha256.New()
	for at := 0; n > 0; n-- {
		if at < 0 || at+dmTargetSpec > len(b) {
			return 0, io.ErrUnexpectedEOF
		}
		spec := b[at:]
		params := spec[dmTargetSpec:]
		end := bytes.IndexByte(params, 0)
		if end < 0 {
			return 0, io.ErrUnexpectedEOF
		}
		h.Write(spec[:16])
		h.Write(spec[24:dmTargetSpec])
		h.Write(params[:end+1])
		at = int(binary.LittleEndian.Uint32(spec[20:]))
	}
	return binary.LittleEndian.Uint64(h.Sum(nil)) | 1, nil // never 0: that stands for no table
}
