package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tidemark/tidemark/internal/qmp"
)

// Pivot moves a paused machine's disk to a file or block device of the host that holds the very same
// content, without the guest's noticing. node is QEMU's name of what the device reads from ("disk0"). After
// it nothing more goes to the old place, which is closed.
//
// It is a mirror job that copies nothing: between pausing and pivoting there is nothing to copy. The job is QEMU's
// own way to put another node below a device. If it fails, [Machine.ReadsFrom] tells where the disk is.
func (m *Machine) Pivot(ctx context.Context, node, path string, device bool) error {
	fail := func(err error) error { return fmt.Errorf("pivot %s to %s: %w", node, path, err) }
	if status, err := m.monitor.Status(ctx); err != nil {
		return fail(err)
	} else if status == qmp.StatusRunning {
		return fail(ErrRunning)
	}
	native := node + "-native"
	driver := "file"
	if device {
		driver = "host_device"
	}
	if err := m.monitor.Execute(ctx, "blockdev-add", map[string]any{
		"node-name": native, "driver": driver, "filename": path, "discard": "unmap",
		"cache": map[string]bool{"direct": true},
	}, nil); err != nil {
		return fail(err)
	}
	undo := func(err error) error {
		// The context may be over.
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), pivotTime)
		defer cancel()
		_ = m.monitor.Execute(c, "block-job-cancel", map[string]any{"device": pivotJob, "force": true}, nil)
		_ = m.waitJob(c, "")
		return fail(errors.Join(err, m.monitor.Execute(c, "blockdev-del", map[string]string{"node-name": native}, nil)))
	}
	if err := m.monitor.Execute(ctx, "blockdev-mirror", map[string]any{
		"job-id": pivotJob, "device": node, "target": native, "sync": "none",
	}, nil); err != nil {
		return undo(err)
	}
	if err := m.waitJob(ctx, "ready"); err != nil {
		return undo(err)
	}
	if err := m.monitor.Execute(ctx, "block-job-complete", map[string]string{"device": pivotJob}, nil); err != nil {
		return undo(err)
	}
	if err := m.waitJob(ctx, ""); err != nil {
		return undo(err)
	}
	devices, err := m.monitor.QueryBlock(ctx)
	if err != nil {
		return fail(err)
	}
	moved := false
	for _, d := range devices {
		if d.Node == node {
			return undo(errors.New("QEMU ended the job, and the disk is where it was"))
		}
		moved = moved || d.Node == native
	}
	if !moved {
		return fail(errors.New("no device reads from the new disk"))
	}
	if err := m.monitor.Execute(ctx, "blockdev-del", map[string]string{"node-name": node}, nil); err != nil {
		return fail(fmt.Errorf("the disk is moved, but the old one stays open: %w", err))
	}
	return nil
}

// ReadsFrom tells for certain that a device still reads from node, and that nothing is about to change that.
func (m *Machine) ReadsFrom(ctx context.Context, node string) (bool, error) {
	var jobs []struct{}
	if err := m.monitor.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return false, err
	}
	devices, err := m.monitor.QueryBlock(ctx)
	if err != nil {
		return false, err
	}
	for _, d := range devices {
		if d.Node == node {
			return len(jobs) == 0, nil
		}
	}
	return false, nil
}

const (
	pivotJob  = "pivot"
	pivotTime = 10 * time.Second
)

// waitJob waits until the job has a status, or, for none, is gone.
func (m *Machine) waitJob(ctx context.Context, status string) error {
	for {
		var jobs []struct {
			ID     string `json:"id"`
			Status string `json:"status"`
			Error  string `json:"error"`
		}
		if err := m.monitor.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
			return err
		}
		there := false
		for _, j := range jobs {
			if j.ID != pivotJob {
				continue
			}
			there = true
			if j.Error != "" {
				return fmt.Errorf("QEMU's job: %s", j.Error)
			}
			if j.Status == status {
				return nil
			}
		}
		if !there {
			if status == "" {
				return nil
			}
			return errors.New("QEMU's job ended early")
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}
