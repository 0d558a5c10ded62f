package faultblob

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// KillAt kills this process, as kill -9 does, at the moment n; never if n is 0.
func KillAt(n int64) Handler {
	return func(_ context.Context, e Event) error {
		if e.N == n {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // until it comes
		}
		return nil
	}
}

// FailAt fails the moment n.
func FailAt(n int64) Handler {
	return func(_ context.Context, e Event) error {
		if e.N == n {
			return fault(e)
		}
		return nil
	}
}

func fault(e Event) error { return fmt.Errorf("%w (%s)", ErrInjected, e) }

// Random fails one moment in so many, and repeats one in so many operations. Runs
// of one seed are alike as far as their moments come in the same order.
func Random(seed uint64, oneIn int) Handler {
	rnd := newRand(seed)
	return func(_ context.Context, e Event) error {
		switch rnd(2 * oneIn) {
		case 0, 1:
			return fault(e)
		case 2:
			if e.When == Before {
				return ErrRepeat
			}
		}
		return nil
	}
}

// Delays makes every moment last up to longest: so operations that run at once end in another
// order than they were begun.
func Delays(seed uint64, longest time.Duration) Handler {
	rnd := newRand(seed)
	return func(ctx context.Context, e Event) error {
		wait := longest * time.Duration(rnd(1000)) / 1000
		select {
		case <-time.After(wait):
			return nil
		case <-ctx.Done():
			if e.When == After {
				return nil // it happened in time
			}
			return ctx.Err()
		}
	}
}

func newRand(seed uint64) func(n int) int {
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(seed, 1))
	return func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rnd.IntN(n)
	}
}

// Until asks h until calm is set.
func Until(calm *atomic.Bool, h Handler) Handler {
	return func(ctx context.Context, e Event) error {
		if calm.Load() {
			return nil
		}
		return h(ctx, e)
	}
}

// All asks each of several handlers, until one has an error.
func All(handlers ...Handler) Handler {
	return func(ctx context.Context, e Event) error {
		for _, h := range handlers {
			if err := h(ctx, e); err != nil {
				return err
			}
		}
		return nil
	}
}

// isRepeat tells ErrRepeat, which is no error, from others.
func isRepeat(err error) bool { return errors.Is(err, ErrRepeat) }
