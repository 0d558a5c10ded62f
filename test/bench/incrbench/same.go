package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// errDiffers is wrapped when a backup does not give back what is on the device.
var errDiffers = errors.New("it is not what is on the device")

// same compares all that r gives with all that is in the file or device at path.
func same(path string, r io.Reader) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; {
		n, errA := io.ReadFull(f, a)
		m, errB := io.ReadFull(r, b)
		if i := differ(a[:n], b[:m]); i >= 0 {
			return fmt.Errorf("%w: at byte %d", errDiffers, off+int64(i))
		}
		off += int64(n)
		for _, err := range []error{errA, errB} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return err
			}
		}
		if errA != nil {
			return nil // both have ended: they were equally long
		}
	}
}

// differ is the first index at which a and b differ, or -1.
func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
