package main

import (
	"fmt"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker for releases.
var version = "dev"

// globals are the flags that every command has.
type globals struct {
	repo  string
	json  bool
	quiet bool
	show  progressFlag
	bar   *progress // see there
	pins  string
	state string // directory

	keyFile        string
	passphraseFile string
	encrypted      bool // the repository must be
}

func newRoot() *cobra.Command {
	g := &globals{show: progressAuto}
	root := &cobra.Command{
		Use:   "tidemark",
		Short: "Incremental backups and instant standbys of VMs, by tracking every write with eBPF",
		Long: `Tidemark sees every write to a VM's block devices from the host's kernel, so that an
incremental backup costs what changed, on any hypervisor. Any restore point can be
mounted, exported over NBD and booted at once.`,
		Example: `  tidemark init -r /srv/backup
  tidemark backup web1 --disk /dev/vg0/web1 -r /srv/backup
  tidemark points -r /srv/backup
  tidemark mount /mnt/points -r /srv/backup
  tidemark export web1@latest -r /srv/backup --socket /run/web1.sock --writable`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w\n  see `%s --help`", err, c.CommandPath())}
	})
	f := root.PersistentFlags()
	f.StringVarP(&g.repo, "repo", "r", os.Getenv("TIDEMARK_REPO"), "repository: a directory, or s3:BUCKET/PREFIX or s3:https://HOST/BUCKET/PREFIX (default $TIDEMARK_REPO)")
	f.StringVar(&g.keyFile, "key-file", "", "key file of an encrypted repository (default $TIDEMARK_KEY_FILE)")
	f.StringVar(&g.passphraseFile, "passphrase-file", "", "file whose first line is the passphrase of an encrypted repository (default $TIDEMARK_PASSPHRASE_FILE; or $TIDEMARK_PASSPHRASE itself)")
	f.BoolVar(&g.encrypted, "encrypted", false, "refuse the repository if it says that it is not encrypted, as is done where a key is given or its passphrase was typed here before")
	f.BoolVar(&g.json, "json", false, "print JSON")
	f.BoolVarP(&g.quiet, "quiet", "q", false, "print errors only")
	f.Var(&g.show, "progress", "how a long command shows how far it is: auto (a line, on a terminal), json (a JSON object per line on stderr, at most one a second), none")
	_ = root.RegisterFlagCompletionFunc("progress", cobra.FixedCompletions([]string{progressAuto, progressJSON, progressNone}, cobra.ShellCompDirectiveNoFileComp))
	f.StringVar(&g.pins, "pin-dir", "", "directory in bpffs where the tracker is pinned")
	_ = f.MarkHidden("pin-dir")
	f.StringVar(&g.state, "state-dir", defaultStateDir, "directory where suspend saves the tracking")
	_ = f.MarkHidden("state-dir")
	root.AddGroup(
		&cobra.Group{ID: "backup", Title: "Back up:"},
		&cobra.Group{ID: "use", Title: "Use restore points:"},
		&cobra.Group{ID: "repository", Title: "Keep the repository:"},
		&cobra.Group{ID: "host", Title: "This host:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("backup", newInit(g), newRepo(g), newBackup(g), newCommit(g), newAudit(g), newAgent(g))
	add("use", newPoints(g), newMount(g), newExport(g), newBoot(g), newAttach(g), newDetach(g), newRestore(g), newVerify(g))
	add("repository", newForget(g), newPin(g), newUnpin(g), newGC(g), newRepair(g), newCopy(g), newStats(g))
	add("host", newDoctor(g), newTrack(g), newUntrack(g), newSuspend(g), newStatus(g), newHeat(g))
	root.AddCommand(newVersion(g), newWatchdog(), newGuard(), newExitCodes())
	return root
}

// args checks the number of arguments, as an error of usage.
func args(least, most int) cobra.PositionalArgs {
	return func(c *cobra.Command, a []string) error {
		if len(a) < least || most >= 0 && len(a) > most {
			return usageError{fmt.Errorf("%s: got %d arguments\n  usage: %s", c.Name(), len(a), c.UseLine())}
		}
		return nil
	}
}

func newVersion(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if g.json {
				return printJSON(c.OutOrStdout(), map[string]string{"version": version, "revision": revision()})
			}
			_, err := fmt.Fprintln(c.OutOrStdout(), toolName())
			return err
		},
	}
}

func toolName() string {
	if r := revision(); r != "" {
		return "tidemark " + version + " (" + r + ")"
	}
	return "tidemark " + version
}

func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return s.Value[:12]
		}
	}
	return ""
}

func newExitCodes() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What the exit status means",
		Long: `Exit status of every command:

    0   done
    1   failed; the message says why
    2   wrong arguments or configuration
    3   this host or user can't do it (not root, no BTF, a device that can't be tracked)
    4   another tidemark process is at it; try again
    5   damage was found in the repository
    6   ALARM: an audit found a change that the tracker had not recorded
    7   an audit had nothing to compare with: no point, or no tracking that goes on from it
    8   the repository is encrypted, and no key was given that opens it or may do this; or it
        must be encrypted, and says that it is not
    9   a boot check did not see the VM come up: it failed, or it could not be told
  130   interrupted by a signal`,
	}
}
