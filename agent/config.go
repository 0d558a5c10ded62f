package agent

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/tidemark/tidemark/store"
)

// Config is the daemon's configuration file.
type Config struct {
	Repository string        `yaml:"repository"`
	Listen     string        `yaml:"listen"` // HTTP address for metrics and health; empty: none
	VMs        []VMConfig    `yaml:"vms"`
	Retry      time.Duration `yaml:"retry"` // after a failed backup; the VM's interval if longer or 0
	// TrustSavedState takes it for granted that no other system wrote to the disks between
	// suspend and the next start.
	TrustSavedState bool `yaml:"trust_saved_state"`

	Parallel  int    `yaml:"parallel"`   // backups at once; DefaultParallel if 0
	LimitRate string `yaml:"limit_rate"` // of all backups together, as ParseRate reads it; no limit if empty
	LimitIOPS int64  `yaml:"limit_iops"` // of all backups together; no limit if 0
	IONice    string `yaml:"ionice"`     // as ParseIOPriority reads it; unchanged if empty
}

// DefaultParallel is how many backups an agent runs at once.
const DefaultParallel = 16

// VMConfig is one VM to back up.
type VMConfig struct {
	Name        string        `yaml:"name"`
	Disks       []string      `yaml:"disks"`
	Every       time.Duration `yaml:"every"`
	Quiesce     string        `yaml:"quiesce"`      // as on the command line; auto if empty
	PauseBudget time.Duration `yaml:"pause_budget"` // DefaultPauseBudget if 0
	Audit       *AuditConfig  `yaml:"audit"`        // nil: none
	LimitRate   string        `yaml:"limit_rate"`   // of this VM's backups, besides the common limit
	LimitIOPS   int64         `yaml:"limit_iops"`
	Keep        *store.Policy `yaml:"keep"` // nil: the repository's owner forgets points
}

// ErrConfig is wrapped when a configuration can't be used.
var ErrConfig = errors.New("configuration")

// LoadConfig reads a file. Unknown keys are errors. Errors wrap ErrConfig.
func LoadConfig(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	c, err := ParseConfig(b)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// ParseConfig reads YAML. Errors wrap ErrConfig.
func ParseConfig(b []byte) (Config, error) {
	c, err := decode(b)
	if err != nil {
		return Config{}, fmt.Errorf("%w: %s", ErrConfig, yaml.FormatError(err, false, true))
	}
	if err := c.check(); err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return c, nil
}

// decode guards against the YAML library, which panics on some nodes with unknown tags.
func decode(b []byte) (c Config, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("not understood: %v", p)
		}
	}()
	err = yaml.UnmarshalWithOptions(b, &c, yaml.Strict())
	return c, err
}

func (c Config) check() error {
	if c.Repository == "" {
		return errors.New("repository is missing")
	}
	if len(c.VMs) == 0 {
		return errors.New("vms is empty")
	}
	if c.Retry < 0 {
		return errors.New("retry is negative")
	}
	if c.Parallel < 0 {
		return errors.New("parallel is negative")
	}
	if _, err := parseLimits(c.LimitRate, c.LimitIOPS); err != nil {
		return err
	}
	if c.IONice != "" {
		if _, err := ParseIOPriority(c.IONice); err != nil {
			return fmt.Errorf("ionice: %w", err)
		}
	}
	seen := map[string]bool{}
	for _, vm := range c.VMs {
		if err := store.ValidVM(vm.Name); err != nil {
			return err
		}
		if seen[vm.Name] {
			return fmt.Errorf("vm %s stands twice", vm.Name)
		}
		seen[vm.Name] = true
		if len(vm.Disks) == 0 {
			return fmt.Errorf("vm %s: disks is empty", vm.Name)
		}
		if vm.Every < time.Second {
			return fmt.Errorf("vm %s: every must be 1s or more", vm.Name)
		}
		if vm.PauseBudget < 0 {
			return fmt.Errorf("vm %s: pause_budget is negative", vm.Name)
		}
		if _, err := ParseQuiesce(vm.Quiesce); err != nil {
			return fmt.Errorf("vm %s: %w", vm.Name, err)
		}
		if _, err := parseLimits(vm.LimitRate, vm.LimitIOPS); err != nil {
			return fmt.Errorf("vm %s: %w", vm.Name, err)
		}
		if vm.Keep != nil {
			if err := vm.Keep.Validate(); err != nil {
				return fmt.Errorf("vm %s: keep: %w", vm.Name, err)
			}
		}
		if err := vm.Audit.check(); err != nil {
			return fmt.Errorf("vm %s: audit: %w", vm.Name, err)
		}
	}
	return nil
}

// parseLimits reads a rate, which may be empty, and a number of reads a second.
func parseLimits(bytes string, iops int64) (l Limits, err error) {
	if bytes != "" {
		if l.BytesPerSecond, err = ParseRate(bytes); err != nil {
			return l, fmt.Errorf("limit_rate: %w", err)
		}
	}
	if l.IOPS = iops; iops < 0 {
		return l, errors.New("limit_iops is negative")
	}
	return l, nil
}
