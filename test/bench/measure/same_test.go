package measure_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func TestSameSeesEveryDifference(t *testing.T) {
	disk := bytes.Repeat([]byte{1, 2, 3}, 1<<20) // ends in the middle of a read
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, disk, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := measure.Same(path, bytes.NewReader(disk)); err != nil {
		t.Fatal(err)
	}
	other := slices.Clone(disk)
	other[len(other)-1]++
	for name, b := range map[string][]byte{"last byte": other, "shorter": disk[:len(disk)-1], "longer": append(slices.Clone(disk), 0), "empty": nil, "much shorter": disk[:1<<20]} {
		if err := measure.Same(path, bytes.NewReader(b)); !errors.Is(err, measure.ErrDiffers) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	broken := errors.New("broken")
	if err := measure.Same(path, iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}
