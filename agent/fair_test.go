package agent_test

import (
	"context"
	"crypto/rand"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/store"
)

// A small VM's backup that comes while a large one's runs gets its share of the common limit, and is done long
// before.
func TestLargeBackupDoesNotStarveSmallOne(t *testing.T) {
	const large, small, rate = 96 << 20, 4 << 20, 24 << 20
	dir := t.TempDir()
	for name, size := range map[string]int{"large": large, "small": small} {
		b := make([]byte, size)
		_, _ = rand.Read(b)
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	repo, err := store.Init(t.Context(), filepath.Join(dir, "repo"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = repo.Close() })
	c, err := agent.ParseConfig([]byte("repository: /x\nlimit_rate: 24MiB\nvms:\n" +
		"  - {name: large, disks: [" + dir + "/large], every: 1h, quiesce: none}\n" +
		"  - {name: small, disks: [" + dir + "/small], every: 1h, quiesce: none}\n"))
	if err != nil {
		t.Fatal(err)
	}
	begun := make(chan struct{})
	a := &agent.Agent{Config: c, Repo: repo, Log: slog.New(slog.DiscardHandler), Source: func(ctx context.Context, path string) (cbt.Source, error) {
		if filepath.Base(path) == "large" {
			close(begun)
		} else {
			select {
			case <-begun:
			case <-ctx.Done():
			}
			time.Sleep(500 * time.Millisecond) // the large one's reads are all waiting
		}
		return cbt.OpenUntracked(path, "test")
	}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	points := func(vm string) int {
		n, err := repo.Points(t.Context(), vm)
		if err != nil {
			t.Fatal(err)
		}
		return len(n)
	}
	begin := time.Now()
	for points("small") == 0 && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	took, first := time.Since(begin), points("large") == 0
	for points("large") == 0 && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	all := time.Since(begin)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// Alone the small one would take 1/6 of a second; shared it is 1/3, and the rest is machinery.
	if !first || took > all/2 {
		t.Errorf("the small backup took %v, the large one %v", took, all)
	}
	if least := time.Duration(large+small-8<<20) * time.Second / rate; all < least {
		t.Errorf("both took %v: the limit allows no less than %v", all, least)
	}
	t.Logf("small %v, large %v", took, all)
}
