package s3

import (
	"fmt"
	"testing"
)

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 5-9/10", "bytes */10", "bytes 0-1/*", "bytes 9-5/10", "bytes 0-18446744073709551615/1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, size, err := parseContentRange(s)
		if err != nil {
			return
		}
		var a, b, n int64
		if _, err := fmt.Sscanf(s, "bytes %d-%d/%d", &a, &b, &n); err != nil || a != first || n != size || first < 0 || first >= size || b < first || b >= size {
			t.Fatalf("%q: %d, %d (%d-%d/%d, %v)", s, first, size, a, b, n, err)
		}
	})
}
