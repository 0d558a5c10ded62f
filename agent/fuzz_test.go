package agent

import (
	"errors"
	"strings"
	"testing"
)

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("repository: /r\nvms:\n  - name: a\n    disks: [/dev/x]\n    every: 5m\n"))
	f.Add([]byte("repository: /r\nvms:\n  - name: a\n    disks: [/dev/x]\n    every: 5m\n    audit: {every: 24h, fraction: 1%, rate: 20MiB}\n"))
	f.Add([]byte("repository: [\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseConfig(b)
		if err != nil {
			if !errors.Is(err, ErrConfig) {
				t.Errorf("%v", err)
			}
			return
		}
		if err := c.check(); err != nil {
			t.Errorf("accepted what its own check refuses: %v", err)
		}
	})
}

func FuzzParseQuiesce(f *testing.F) {
	for _, s := range []string{"", "auto", "none", "qmp=/x", "freeze=/mnt", "pid=12", "pid=1", "qmp="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		q, err := ParseQuiesce(s)
		if err != nil {
			if !errors.Is(err, ErrQuiesceSyntax) {
				t.Errorf("%v", err)
			}
			return
		}
		if s != "" && q.String() != s {
			t.Errorf("%q became %q", s, q)
		}
	})
}

// A process may call itself anything.
func FuzzQMPSocket(f *testing.F) {
	f.Add("qemu\x00-qmp\x00unix:/run/q,server=on")
	f.Add("qemu\x00-chardev\x00socket,id=m,path=/run/q\x00-mon\x00chardev=m,mode=control")
	f.Add("-qmp")
	f.Fuzz(func(t *testing.T, s string) {
		path := qmpSocket(strings.Split(s, "\x00"))
		if strings.Contains(path, ",") {
			t.Errorf("%q", path)
		}
	})
}

func TestQMPSocketIsFoundInQEMUsCommandLine(t *testing.T) {
	for line, want := range map[string]string{
		"qemu -qmp unix:/run/a,server=on,wait=off":                                "/run/a",
		"qemu -chardev socket,id=mon0,path=/run/b -mon chardev=mon0,mode=control": "/run/b",
		"qemu -chardev socket,id=mon0,path=/run/b -mon chardev=mon0":              "",
		"qemu -qmp tcp:127.0.0.1:1":                                               "",
		"qemu":                                                                    "",
	} {
		if got := qmpSocket(strings.Fields(line)); got != want {
			t.Errorf("%s: got %q, want %q", line, got, want)
		}
	}
}
