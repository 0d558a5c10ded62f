package agent

import (
	"context"
	"fmt"
	"os"
	"time"
)

// PauseAndHang pauses a guest as a backup does, says so, and never resumes it.
func PauseAndHang(socket string, limit time.Duration) error {
	q := &qmpPauser{socket: socket}
	ctx := context.Background()
	if err := q.Prepare(ctx); err != nil {
		return err
	}
	dog, err := startWatchdog([]string{os.Args[0], WatchdogCommand}, q.rescue())
	if err != nil {
		return err
	}
	if err := dog.arm(limit); err != nil {
		return err
	}
	if err := q.Pause(ctx); err != nil {
		return err
	}
	fmt.Println("paused")
	select {}
}
