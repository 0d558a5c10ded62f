package measure

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// ErrDiffers is wrapped when a backup does not give back what was backed up.
var ErrDiffers = errors.New("it is not what was backed up")

// Same compares all that r gives with all that is in the file or device at path.
func Same(path string, r io.Reader) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; {
		n, errA := io.ReadFull(f, a)
		m, errB := io.ReadFull(r, b)
		for _, err := range []error{errA, errB} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return err
			}
		}
		if i := differ(a[:n], b[:m]); i >= 0 {
			return fmt.Errorf("%w: byte %d is another one", ErrDiffers, off+int64(i))
		}
		if n != m {
			return fmt.Errorf("%w: one ends at byte %d, the other does not", ErrDiffers, off+int64(min(n, m)))
		}
		off += int64(n)
		if errA != nil {
			return nil // both have ended: they were equally long
		}
	}
}

// differ is the first index, of those that both have, at which a and b differ, or -1.
func differ(a, b []byte) int {
	n := min(len(a), len(b))
	if bytes.Equal(a[:n], b[:n]) {
		return -1
	}
	i := 0
	for a[i] == b[i] {
		i++
	}
	return i
}
