// Command tidemark tracks, backs up, shows, exports and restores the disks of
// virtual machines.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/tidemark/tidemark/guestfs/appliance"
)

func main() {
	if appliance.IsInit() {
		appliance.Init() // this is the machine that reads guest file systems
	}
	os.Exit(run(os.Args[1:]))
}

// run is main without the exit, so that tests can call it in a process of theirs.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tidemark: "+message(err))
	}
	return exitCode(ctx, err)
}
