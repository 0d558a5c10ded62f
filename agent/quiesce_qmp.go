package agent

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark/tidemark/internal/qmp"
	"github.com/tidemark/tidemark/store"
)

// qmpPauser pauses a QEMU guest. QEMU's stop returns when the virtual CPUs stand
// and all block requests were drained and flushed (vm_stop and bdrv_drain_all
// in softmmu/cpus.c).
type qmpPauser struct {
	socket string
	client *qmp.Client
	paused atomic.Bool
}

func (q *qmpPauser) Method() string                 { return "qmp" }
func (q *qmpPauser) Consistency() store.Consistency { return store.Crash }
func (q *qmpPauser) rescue() rescue                 { return rescue{Kind: "qmp", Target: q.socket} }

func (q *qmpPauser) Prepare(ctx context.Context) error {
	var err error
	q.client, err = qmp.Dial(ctx, q.socket, qmp.Options{})
	if err != nil {
		return fmt.Errorf("connect to QEMU's monitor at %s: %w", q.socket, err)
	}
	return nil
}

// Flush does nothing: what QEMU caches is the host's page cache, which is synced anyway.
func (q *qmpPauser) Flush(context.Context) error { return nil }

func (q *qmpPauser) Running(ctx context.Context) (bool, error) {
	status, err := q.client.Status(ctx)
	if err != nil {
		return false, fmt.Errorf("ask for the guest's status: %w", err)
	}
	return status == qmp.StatusRunning, nil
}

func (q *qmpPauser) Pause(ctx context.Context) error {
	running, err := q.Running(ctx)
	if err != nil || !running {
		return err // one that stands already is not ours to resume
	}
	q.paused.Store(true) // also if stop fails half way
	if err := q.client.Stop(ctx); err != nil {
		return fmt.Errorf("pause the guest: %w", err)
	}
	return nil
}

func (q *qmpPauser) Resume(ctx context.Context) error {
	if !q.paused.Load() {
		return nil
	}
	if err := q.client.Cont(ctx); err != nil {
		return fmt.Errorf("resume the guest: %w", err)
	}
	q.paused.Store(false)
	return nil
}

func (q *qmpPauser) Close() error {
	if q.client == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return errors.Join(q.Resume(ctx), q.client.Close())
}

// rescueQMP resumes the guest if it is paused. It tries for as long as QEMU is there: the
// monitor is busy until the dead process' connection is closed, which takes as long
// as the last input or output of that process hangs.
func rescueQMP(ctx context.Context, socket string) error {
	for {
		err := func() error {
			c, err := qmp.Dial(ctx, socket, qmp.Options{})
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			status, err := c.Status(ctx)
			if err != nil || status != qmp.StatusPaused {
				return err
			}
			return c.Cont(ctx)
		}()
		if err == nil {
			return nil
		}
		if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("QEMU is gone: %w", err)
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}
