package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/store"
)

func TestDaemonForgetsWhatThePolicyDoesNotKeep(t *testing.T) {
	b := newBench(t)
	var log lockedBuffer
	a := &agent.Agent{
		Config: agent.Config{Repository: b.repo.Location(), VMs: []agent.VMConfig{{
			Name: "vm", Disks: []string{b.dev}, Every: 100 * time.Millisecond, Keep: &store.Policy{Last: 2},
		}}},
		Repo: b.repo, Source: b.source, Tool: "test", Log: slog.New(slog.NewTextHandler(&log, nil)),
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	for end := time.Now().Add(30 * time.Second); strings.Count(log.String(), "points forgotten") < 3; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Error("nothing is forgotten: ", log.String())
			break
		}
	}
	cancel()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	names, err := b.repo.Points(t.Context(), "vm")
	if err != nil || len(names) < 2 || len(names) > 3 { // the last one may not have come to it
		t.Errorf("%d points, %v", len(names), err)
	}
	if s := log.String(); strings.Contains(s, "level=ERROR") {
		t.Error(s)
	}
}
