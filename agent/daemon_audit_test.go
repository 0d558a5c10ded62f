package agent_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidemark/tidemark/agent"
)

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// The daemon audits between its backups, counts what it finds, and shouts.
func TestDaemonAudits(t *testing.T) {
	b := newBench(t)
	var log lockedBuffer
	addr := make(chan string, 1)
	a := &agent.Agent{
		Config: agent.Config{Repository: b.repo.Location(), Listen: "127.0.0.1:0", VMs: []agent.VMConfig{{
			Name: "vm", Disks: []string{b.dev}, Every: time.Second,
			Audit: &agent.AuditConfig{Every: time.Second, Fraction: "100%", Evidence: t.TempDir()},
		}}},
		Repo: b.repo, Source: b.source, Auditor: b.auditor, Tool: "test", Log: slog.New(slog.NewTextHandler(&log, nil)),
		Ready: func(l net.Addr) { addr <- l.String() },
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	url := "http://" + <-addr + "/metrics"

	wait := func(what string, ok func(metrics string) bool) {
		t.Helper()
		var last string
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			resp, err := http.Get(url)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if last = string(body); ok(last) {
				return
			}
		}
		t.Fatalf("%s: never:\n%s\n%s", what, last, log.String())
	}
	wait("a clean audit", func(m string) bool {
		return strings.Contains(m, `tidemark_audit_last_timestamp_seconds{vm="vm"}`) &&
			!strings.Contains(m, `tidemark_audit_granules_total{vm="vm"} 0`) && strings.Contains(m, `tidemark_audit_mismatches_total{vm="vm"} 0`)
	})
	b.forge(t, 4<<20, []byte("missed"))
	wait("the alarm", func(m string) bool { return strings.Contains(m, `tidemark_audit_mismatches_total{vm="vm"} 1`) })
	wait("the next backup compares", func(m string) bool { return strings.Contains(m, `tidemark_compared_total{vm="vm"} 1`) })
	if s := log.String(); !strings.Contains(s, `level=ERROR msg="an audit found a change that was not recorded`) {
		t.Error(s)
	}
	if s := log.String(); strings.Contains(s, "backup failed") {
		t.Error("an audit stood in a backup's way: ", s)
	}
	cancel()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
