package cbt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
)

// Of utmp(5), as glibc lays it out on x86-64.
const (
	utmpRecord  = 384 // sizeof(struct utmp)
	utmpBoot    = 2   // BOOT_TIME
	utmpSeconds = 340 // offset of ut_tv.tv_sec
)

// bootsSince counts the starts of the host after a time that are on record; 0 also if there
// is no record.
func bootsSince(wtmp string, since time.Time) (int, error) {
	b, err := os.ReadFile(wtmp)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("starts of the host: %w", err)
	}
	n := 0
	for ; len(b) >= utmpRecord; b = b[utmpRecord:] {
		if binary.LittleEndian.Uint16(b) == utmpBoot && int64(binary.LittleEndian.Uint32(b[utmpSeconds:])) > since.Unix() {
			n++
		}
	}
	return n, nil
}
