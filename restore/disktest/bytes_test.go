package disktest

import (
	"testing"

	"github.com/tidemark/tidemark/restore"
)

func TestBytesIsADisk(t *testing.T) {
	Run(t, func(_ *testing.T, content []byte) restore.Disk { return Bytes(content) })
}
