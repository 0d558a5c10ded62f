package procfs

import (
	"strings"
	"testing"
)

func TestUnescape(t *testing.T) {
	for s, want := range map[string]string{
		`/mnt/a\040b`: "/mnt/a b", `\011\012\134`: "\t\n\\", `/mnt/a`: "/mnt/a", `\`: `\`, `\04`: `\04`, `\9`: `\9`, `\999`: `\999`, `\777`: `\777`, "": "",
	} {
		if got := Unescape(s); got != want {
			t.Errorf("%q became %q, want %q", s, got, want)
		}
	}
}

func FuzzUnescape(f *testing.F) {
	f.Add(`/mnt/a\040b`)
	f.Add(`\`)
	f.Add(`\9`)
	f.Fuzz(func(t *testing.T, s string) {
		if got := Unescape(s); len(got) > len(s) || !strings.Contains(s, `\`) && got != s {
			t.Errorf("%q became %q", s, got)
		}
	})
}
