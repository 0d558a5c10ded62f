package agent

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestAuditConfig(t *testing.T) {
	const head = "repository: /r\nvms:\n  - name: a\n    disks: [/dev/x]\n    every: 5m\n    audit: "
	c, err := ParseConfig([]byte(head + "{every: 24h, fraction: 2.5%, rate: 20MiB, evidence: /e}\n"))
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.VMs[0].Audit.audit()
	if err != nil || a.Fraction != 0.025 || a.Rate != 20<<20 || a.Evidence != "/e" || c.VMs[0].Audit.Every != 24*time.Hour {
		t.Errorf("%v: %+v", err, a)
	}
	if c, err = ParseConfig([]byte(head + "{every: 1h}\n")); err != nil {
		t.Error(err)
	} else if a, err = c.VMs[0].Audit.audit(); err != nil || a.Fraction != 0 || a.Rate != 0 {
		t.Errorf("%v: %+v", err, a)
	}
	for text, want := range map[string]string{
		"{fraction: 1%}":                    "every must be",
		"{every: 1ms}":                      "every must be",
		"{every: 1h, fraction: 0}":          "fraction",
		"{every: 1h, fraction: 101%}":       "fraction",
		"{every: 1h, fraction: NaN}":        "fraction",
		"{every: 1h, fraction: -1%}":        "fraction",
		"{every: 1h, rate: fast}":           "rate",
		"{every: 1h, rate: 1}":              "rate",
		"{every: 1h, rate: 99999999999EiB}": "rate",
		"{every: 1h, samples: 5}":           "samples", // unknown key
	} {
		if _, err := ParseConfig([]byte(head + text + "\n")); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error about %s", text, err, want)
		}
	}
}

func TestParseFractionAndRate(t *testing.T) {
	for s, want := range map[string]float64{"1%": 0.01, "0.5": 0.5, "100%": 1, "1": 1, "12.5 %": 0.125} {
		if f, err := ParseFraction(s); err != nil || f != want {
			t.Errorf("%q: %v, %v", s, f, err)
		}
	}
	for s, want := range map[string]int64{"20MiB": 20 << 20, "20MiB/s": 20 << 20, "4096": 4096, "1MB": 1e6} {
		if n, err := ParseRate(s); err != nil || n != want {
			t.Errorf("%q: %v, %v", s, n, err)
		}
	}
}
