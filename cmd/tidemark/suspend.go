package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
)

// defaultStateDir is where tracking is saved over a restart of the host.
const defaultStateDir = "/var/lib/tidemark/state"

// trustFlag adds --trust-saved-state.
func trustFlag(c *cobra.Command, s *bool) {
	c.Flags().BoolVar(s, "trust-saved-state", false, "after a clean restart, take it for granted that no other system wrote to the disk meanwhile")
}

func newSuspend(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "suspend [DEV...]",
		Short: "Save the tracking before the host is shut down",
		Long: `Save the tracking of the devices (default: of all that are tracked) when their VMs are stopped
and the host is about to shut down, so that the first backup after it need not compare.

Nobody may have a device mounted or open for writing. It becomes read-only until track or
backup uses it again, or the host is started anew. What was saved is used once, in the boot
after, by the first track, backup or agent, if nobody wrote in between; that is proven for loop
devices by the times of their file, and has to be taken for granted for others
(--trust-saved-state, of whichever command uses it). Image files and partitions are not saved.`,
		Example: `  tidemark suspend
  tidemark track --saved        # early in the next boot, before the VMs start`,
		Args: args(0, -1),
		RunE: func(c *cobra.Command, devs []string) (err error) {
			tr, err := bpf.Open(bpf.Options{Dir: g.pins, AdoptOnly: true})
			if errors.Is(err, bpf.ErrNotAttached) && !errors.Is(err, bpf.ErrUnusable) && len(devs) == 0 {
				return nil // nothing is tracked
			}
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, tr.Close()) }()
			if len(devs) == 0 {
				all, err := tr.Status()
				if err != nil {
					return err
				}
				for _, s := range all {
					switch {
					case s.Image && !g.quiet:
						_, _ = fmt.Fprintf(c.OutOrStdout(), "%s is an image file: it is not saved, and compared after the restart\n", s.Name)
					case s.Image:
					case s.Name != "":
						devs = append(devs, "/dev/"+strings.ReplaceAll(s.Name, "!", "/"))
					}
				}
			}
			state := cbt.State{Dir: g.state}
			var errs []error
			for _, dev := range devs {
				err := state.Save(tr, dev)
				errs = append(errs, err)
				if err == nil && !g.quiet {
					_, _ = fmt.Fprintf(c.OutOrStdout(), "%s is saved, and read-only until it is tracked or backed up again\n", dev)
				}
			}
			return errors.Join(errs...)
		},
	}
}
