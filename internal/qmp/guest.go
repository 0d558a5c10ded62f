package qmp

import "context"

// States of a guest, as told by Status. There are more: see RunState in QEMU's
// qapi/run-state.json.
const (
	StatusRunning   = "running"
	StatusPaused    = "paused"
	StatusPrelaunch = "prelaunch" // started with -S, not resumed yet
	StatusShutdown  = "shutdown"  // powered off, with -no-shutdown
)

// Status asks for the guest's state (query-status).
func (c *Client) Status(ctx context.Context) (string, error) {
	var r struct {
		Status string `json:"status"`
	}
	if err := c.Execute(ctx, "query-status", nil, &r); err != nil {
		return "", err
	}
	return r.Status, nil
}

// Stop pauses the guest. When it returns nil the virtual CPUs stand still and
// all guest I/O that QEMU had accepted is completed and flushed to the host
// (do_vm_stop in QEMU's softmmu/cpus.c drains and flushes all block devices).
// Stopping a guest that does not run changes nothing.
//
// If it fails because of its context the guest may be paused, or become so
// later: the caller must still see to Cont.
func (c *Client) Stop(ctx context.Context) error { return c.Execute(ctx, "stop", nil, nil) }

// Cont resumes the guest. Resuming a guest that runs changes nothing.
func (c *Client) Cont(ctx context.Context) error { return c.Execute(ctx, "cont", nil, nil) }

// Quit ends QEMU at once, without telling the guest. QEMU may be gone before
// its answer arrives, so ErrClosed is not a failure here.
func (c *Client) Quit(ctx context.Context) error { return c.Execute(ctx, "quit", nil, nil) }
