package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/tidemark/tidemark/store"
)

// forget applies the VM's policy after a backup, in local time. What it forgets is
// garbage, which is collected by `tidemark gc`. A failure costs space and nothing else.
func (a *Agent) forget(ctx context.Context, vm VMConfig, log *slog.Logger) {
	if vm.Keep == nil {
		return
	}
	forgotten, err := forgetBy(ctx, a.Repo, vm.Name, *vm.Keep)
	if len(forgotten) > 0 {
		log.Info("restore points forgotten", "points", len(forgotten))
	}
	if err != nil && ctx.Err() == nil {
		log.Error("forgetting restore points failed", "error", err)
	}
}

func forgetBy(ctx context.Context, repo *store.Repo, vm string, p store.Policy) ([]store.PointName, error) {
	ds, err := repo.Decide(ctx, vm, p, time.Local)
	if err != nil {
		return nil, fmt.Errorf("policy of %s: %w", vm, err)
	}
	forgotten, err := repo.Forget(ctx, store.NotKept(ds), nil)
	if errors.Is(err, store.ErrPinned) { // pinned since it was decided
		err = nil
	}
	return forgotten, err
}
