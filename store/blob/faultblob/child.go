package faultblob

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// childEnv tells a test binary that it is a child, and what to do.
const childEnv = "TIDEMARK_TEST_CHILD"

// Job is what a child does: the program under test, over the Layer that is to kill it. say
// tells the parent something, such as what was acknowledged, at once.
type Job func(ctx context.Context, l *Layer, say func(string), args []string) error

type order struct {
	Job  string
	At   int64
	Args []string
}

// Main does the job and exits, if this process is a child. It is called at the
// beginning of TestMain.
func Main(jobs map[string]Job) {
	text := os.Getenv(childEnv)
	if text == "" {
		return
	}
	err := child(jobs, text)
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func child(jobs map[string]Job, text string) error {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	job := jobs[o.Job]
	if job == nil {
		return fmt.Errorf("no job %q", o.Job)
	}
	kill := KillAt(o.At)
	var l *Layer
	l = New(func(ctx context.Context, e Event) error {
		if e.N == o.At {
			fmt.Println("at", e)
			l.power.fail()
		}
		return kill(ctx, e)
	})
	l.Only(Changing)
	say := func(s string) { fmt.Println("say", s) }
	if err := job(context.Background(), l, say, o.Args); err != nil {
		return err
	}
	fmt.Println("end", l.Count())
	l.power.fail()
	return nil
}

// Outcome is what became of a child.
type Outcome struct {
	Said    []string
	Killed  string // the moment at which it was killed; empty if it came to its end, or was killed from outside
	Moments int64  // how many there were, if it came to its end
}

// Run starts this test binary as a child that does the job and is killed at the moment at; 0: never. A
// child that fails otherwise fails the test. Moments are those of Changing.
func Run(t testing.TB, at int64, job string, args ...string) Outcome {
	t.Helper()
	return run(t, at, 0, job, args)
}

// RunFor starts a child that is killed from outside after d.
func RunFor(t testing.TB, d time.Duration, job string, args ...string) Outcome {
	t.Helper()
	return run(t, 0, d, job, args)
}

func run(t testing.TB, at int64, d time.Duration, job string, args []string) Outcome {
	t.Helper()
	text, err := json.Marshal(order{job, at, args})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if d > 0 {
		defer time.AfterFunc(d, func() { _ = cmd.Process.Kill() }).Stop()
	}
	var o Outcome
	for lines := bufio.NewScanner(out); lines.Scan(); {
		what, rest, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "say":
			o.Said = append(o.Said, rest)
		case "at":
			o.Killed = rest
		case "end":
			if _, err := fmt.Sscan(rest, &o.Moments); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("child: %s", lines.Text())
		}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	if err != nil && !killed {
		t.Fatalf("child: %v\n%s", err, stderr.String())
	}
	if o.Killed != "" != (killed && d == 0) {
		t.Fatalf("child: %v, killed at %q\n%s", err, o.Killed, stderr.String())
	}
	return o
}
