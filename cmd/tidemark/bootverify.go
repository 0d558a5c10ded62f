package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
	"github.com/tidemark/tidemark/vm"
)

// errNotBooted ends a boot check whose verdict was printed already.
var errNotBooted = errors.New("the VM did not come up")

// checkedPoint is a boot check as --json says it.
type checkedPoint struct {
	VM    string `json:"vm"`
	Point string `json:"point"`
	store.Check
	Line    string `json:"line,omitempty"`
	Screens int    `json:"screens"`
	Console string `json:"console"`
	Kept    bool   `json:"kept"`
}

// runCheck boots the machine, waits for a verdict, and keeps it.
func (o *bootOptions) runCheck(c *cobra.Command, g *globals, repo *store.Repo, p *restore.PointDetails, b *booting, mo vm.MachineOptions, expect *regexp.Regexp) (err error) {
	ctx := c.Context()
	watch := vm.NewBootWatch()
	mo.Console = watch
	if o.console != "" {
		f, err := os.OpenFile(o.console, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		mo.Console = io.MultiWriter(watch, f)
	}
	begin := time.Now()
	m, err := vm.StartMachine(ctx, mo)
	if err != nil {
		return errors.Join(err, b.broken())
	}
	r, err := vm.CheckBoot(ctx, m, watch, vm.CheckOptions{Expect: expect, Timeout: o.timeout, Broken: b.broken})
	if err := errors.Join(err, m.Quit(context.WithoutCancel(ctx))); err != nil {
		return err
	}
	done := checkedPoint{
		VM: p.VM, Point: p.ID, Line: r.Line, Screens: r.Screens, Console: string(r.Console),
		Check: store.Check{
			Time: begin, Verdict: string(r.Verdict), Reason: clip(r.Reason, 500), Took: r.Took,
			Machine: machineJSON(&mo.Config, mo.Accel), Tool: toolName(),
		},
	}
	if o.screenshot != "" && len(r.Screen) > 0 {
		if err := os.WriteFile(o.screenshot, r.Screen, 0o600); err != nil {
			return err
		}
	}
	if !o.forget {
		kept, err := repo.KeepCheck(ctx, p.PointInfo, done.Check, store.Seen{Line: r.Line, Console: r.Console, Screen: r.Screen})
		if err != nil {
			return fmt.Errorf("%w (the verdict was: %s, %s)", err, r.Verdict, r.Reason)
		}
		done.Check, done.Kept = kept, true
	}
	if g.json {
		err = printJSON(c.OutOrStdout(), done)
	} else if !g.quiet || r.Verdict != vm.Booted {
		err = printVerdict(c.OutOrStdout(), done)
	}
	if err == nil && r.Verdict != vm.Booted {
		err = errNotBooted
	}
	return err
}

func printVerdict(w io.Writer, d checkedPoint) error {
	_, err := fmt.Fprintf(w, "%s@%s  %s after %s: %s\n", d.VM, d.Point, d.Verdict, short(d.Took), d.Reason)
	if d.Line != "" {
		_, perr := fmt.Fprintf(w, "  console: %s\n", d.Line)
		err = errors.Join(err, perr)
	}
	return err
}

// clip cuts a text to n bytes.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n-3] + "..."
	}
	return s
}

// newGuard is run by boot itself, see package vm.
func newGuard() *cobra.Command {
	return &cobra.Command{
		Use: vm.GuardCommand, Hidden: true, DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, a []string) error {
			status, err := vm.RunGuard(a)
			if err != nil {
				return err
			}
			os.Exit(status) // QEMU's own
			return nil
		},
	}
}
