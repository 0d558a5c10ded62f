package agent_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
)

// hangCommand makes the test binary a backup that hangs in mid-pause.
const hangCommand = "__hang"

// TestMain lets the test binary be its own watchdog.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 {
		var err error
		switch os.Args[1] {
		case agent.WatchdogCommand:
			err = agent.RunWatchdog(os.Args[2:], os.Stdin, os.Stdout)
		case backupCommand:
			err = slowBackup(os.Args[2], os.Args[3])
		case hangCommand:
			var limit time.Duration
			if limit, err = time.ParseDuration(os.Args[3]); err == nil {
				err = agent.PauseAndHang(os.Args[2], limit)
			}
		default:
			os.Exit(m.Run())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}
