package tail_test

import (
	"fmt"
	"testing"

	"github.com/tidemark/tidemark/internal/tail"
)

func TestTheEndIsKept(t *testing.T) {
	b := tail.Buffer{Max: 8}
	for i := range 10 {
		if n, err := fmt.Fprintf(&b, "%d--\n", i); n != 4 || err != nil {
			t.Fatal(n, err)
		}
	}
	if got := b.String(); got != "8--\n9--" {
		t.Errorf("kept %q", got)
	}
	var usual tail.Buffer
	_, _ = usual.Write(make([]byte, 9<<10))
	if got := usual.String(); len(got) != 8<<10 {
		t.Errorf("the zero value keeps %d bytes", len(got))
	}
}
