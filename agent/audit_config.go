package agent

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// AuditConfig is how the daemon audits a VM.
type AuditConfig struct {
	Every    time.Duration `yaml:"every"`
	Fraction string        `yaml:"fraction"` // as ParseFraction reads it; DefaultAuditFraction if empty
	Rate     string        `yaml:"rate"`     // as ParseRate reads it; no limit if empty
	Evidence string        `yaml:"evidence"` // DefaultEvidenceDir if empty
}

func (c *AuditConfig) check() error {
	if c == nil {
		return nil
	}
	if c.Every < time.Second {
		return errors.New("every must be 1s or more")
	}
	_, err := c.audit()
	return err
}

// audit is the part of an Audit that the configuration says.
func (c *AuditConfig) audit() (Audit, error) {
	a := Audit{Evidence: c.Evidence}
	var err error
	if c.Fraction != "" {
		if a.Fraction, err = ParseFraction(c.Fraction); err != nil {
			return a, err
		}
	}
	if c.Rate != "" {
		a.Rate, err = ParseRate(c.Rate)
	}
	return a, err
}

// ParseFraction reads a part of the whole, as 1% or 0.01: more than 0, at most 1.
func ParseFraction(s string) (float64, error) {
	num, percent := strings.CutSuffix(s, "%")
	f, err := strconv.ParseFloat(strings.TrimSpace(num), 64)
	if percent {
		f /= 100
	}
	if err != nil || !(f > 0 && f <= 1) {
		return 0, fmt.Errorf("fraction %q: must be as 1%% or 0.01, and at most 100%%", s)
	}
	return f, nil
}

// ParseRate reads bytes per second, as 20MiB or 20MiB/s: at least 4 KiB.
func ParseRate(s string) (int64, error) {
	n, err := humanize.ParseBytes(strings.TrimSuffix(s, "/s"))
	if err != nil || n < 4096 || n > math.MaxInt64 {
		return 0, fmt.Errorf("rate %q: must be bytes per second as 20MiB, and at least 4KiB", s)
	}
	return int64(n), nil
}
