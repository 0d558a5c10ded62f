package restore_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/restore/disktest"
)

func TestSectionIsADisk(t *testing.T) {
	for name, around := range map[string][2]int{"inside": {3*512 + 1, 70_000}, "at the end": {4096, 0}, "all": {0, 0}} {
		t.Run(name, func(t *testing.T) {
			disktest.Run(t, func(t *testing.T, content []byte) restore.Disk {
				whole := slices.Concat(disktest.Noise(around[0], 1), content, disktest.Noise(around[1], 2))
				s, err := restore.Section(disktest.Bytes(whole), int64(around[0]), int64(len(content)))
				if err != nil {
					t.Fatal(err)
				}
				return s
			})
		})
	}
}

func TestSectionStaysOnItsDisk(t *testing.T) {
	for _, s := range [][2]int64{{-1, 5}, {0, 101}, {100, 1}, {50, 1<<63 - 1}, {5, -1}} {
		if _, err := restore.Section(disktest.Bytes(make([]byte, 100)), s[0], s[1]); !errors.Is(err, restore.ErrRange) {
			t.Errorf("section %v of 100 bytes: %v, want ErrRange", s, err)
		}
	}
}
