package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
)

// Verdict of a boot check.
type Verdict string

// Verdicts. Unknown means that neither was seen: no reason to trust the point, and none to
// distrust it.
const (
	Booted        Verdict = "booted"
	BootFailed    Verdict = "failed"
	BootUncertain Verdict = "unknown"
)

// CheckOptions say what a boot check looks for, and for how long.
type CheckOptions struct {
	Expect  *regexp.Regexp // shows that the guest is up; nil: a login prompt and the like
	Timeout time.Duration  // default DefaultCheckTimeout
	// Broken, if set, says why the disks could not be read, if they could not: then the guest's failing says
	// nothing of the guest.
	Broken func() error
}

// DefaultCheckTimeout is how long a boot check waits.
const DefaultCheckTimeout = 5 * time.Minute

// CheckResult is what a boot check found.
type CheckResult struct {
	Verdict Verdict
	Reason  string        // what was seen, or not; nothing that the guest wrote
	Line    string        // of the console that shows it; the guest's words
	Took    time.Duration // from the start to the verdict
	Console []byte        // what the guest printed, the last MaxConsole bytes, without control sequences
	Screen  []byte        // PNG of what its screen showed last; empty: none could be had
	Screens int           // different ones that were seen
}

// MaxConsole bounds what of a console's text is kept, in bytes.
const MaxConsole = 256 << 10

const (
	screenEvery = 2 * time.Second
	screenTime  = 5 * time.Second
	// maxResets is how often a guest may restart on its way up: first boots do.
	maxResets = 3
	// lastWords is how long is listened on after a guest ended or panicked.
	lastWords = 300 * time.Millisecond
)

// BootWatch collects what a guest prints. It is the Console of the machine that is to
// be checked. Safe for concurrent use.
type BootWatch struct {
	mu   sync.Mutex
	text []byte // without control sequences
	held []byte // the beginning of a control sequence
	more chan struct{}
}

// NewBootWatch makes an empty one.
func NewBootWatch() *BootWatch { return &BootWatch{more: make(chan struct{}, 1)} }

// Write implements io.Writer.
func (b *BootWatch) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	raw := slices.Concat(b.held, p)
	b.held = nil
	// A sequence may be cut in two.
	if at := bytes.LastIndexByte(raw, 0x1b); at >= 0 && len(raw)-at < 64 && !escapes.Match(raw[at:]) {
		b.held = bytes.Clone(raw[at:])
		raw = raw[:at]
	}
	raw = bytes.ReplaceAll(escapes.ReplaceAll(raw, nil), []byte("\r\n"), []byte("\n"))
	b.text = append(b.text, bytes.ReplaceAll(raw, []byte("\r"), nil)...)
	if n := len(b.text) - 2*MaxConsole; n > 0 {
		b.text = append(b.text[:0], b.text[n+MaxConsole:]...)
	}
	select {
	case b.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

// Text is what the guest printed last, at most MaxConsole bytes.
func (b *BootWatch) Text() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.text[max(0, len(b.text)-MaxConsole):])
}

// find returns the first of signs that the text shows, and the line it is in.
func find(text []byte, signs []sign) (name, line string) {
	for _, s := range signs {
		at := s.re.FindIndex(text)
		if at == nil {
			continue
		}
		from := bytes.LastIndexByte(text[:at[0]], '\n') + 1
		to := len(text)
		if n := bytes.IndexByte(text[at[1]:], '\n'); n >= 0 {
			to = at[1] + n
		}
		return s.name, printable(text[from:min(to, from+200)])
	}
	return "", ""
}

// printable leaves out what a terminal would act on: taking out control sequences may join the parts of another.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, strings.ToValidUTF8(string(b), ""))
}

// happened is what the machine did since it was started.
type happened struct {
	mu                 sync.Mutex
	panicked, shutdown bool
	resets             int
}

func (h *happened) note(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// CheckBoot watches a machine that was just started until it is up, has failed, or the time is
// over. It leaves the machine as it is. console must be the machine's.
// The error is that of the context.
func CheckBoot(ctx context.Context, m *Machine, console *BootWatch, o CheckOptions) (CheckResult, error) {
	begin := time.Now()
	if o.Timeout <= 0 {
		o.Timeout = DefaultCheckTimeout
	}
	life := signsOfLife
	if o.Expect != nil {
		life = []sign{{"what was expected", o.Expect}}
	}
	end := time.NewTimer(o.Timeout)
	defer end.Stop()

	watch, stop := context.WithCancel(ctx)
	var h happened
	var watching sync.WaitGroup
	changed := make(chan struct{}, 1)
	notify := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	watching.Go(func() {
		m.Watch(watch, Watcher{
			Panicked: func() { h.note(func() { h.panicked = true }); notify() },
			Shutdown: func() { h.note(func() { h.shutdown = true }); notify() },
			Reset:    func() { h.note(func() { h.resets++ }); notify() },
		})
	})
	s := &screens{m: m, file: filepath.Join(m.Dir(), "screen.png")}
	look := time.NewTicker(screenEvery)
	defer look.Stop()

	var r CheckResult
	ended := false
	for r.Verdict == "" {
		r = judge(console.Text(), life, &h)
		if r.Verdict != "" {
			break
		}
		if ended {
			r = CheckResult{Verdict: BootUncertain, Reason: "QEMU ended"}
			if m.Err() != nil {
				r.Reason += " with an error"
			}
			break
		}
		select {
		case <-ctx.Done():
		case <-end.C:
			r = CheckResult{Verdict: BootUncertain, Reason: fmt.Sprintf("nothing that shows whether it is up was seen within %v; %s", o.Timeout, s.state())}
		case <-m.Done():
			ended = true // what it printed last is there
		case <-console.more:
		case <-changed:
			// What the guest printed meanwhile may still be on its way.
			rest(ctx, lastWords)
		case <-look.C:
			s.look(ctx)
		}
		if err := ctx.Err(); err != nil {
			stop()
			watching.Wait()
			return CheckResult{}, err
		}
	}
	stop()
	watching.Wait()
	r.Took = time.Since(begin)
	if o.Broken != nil && r.Verdict != Booted {
		if err := o.Broken(); err != nil {
			r.Verdict, r.Reason = BootUncertain, "its disks could not be read: "+err.Error()
		}
	}
	if !ended {
		s.look(ctx)
	}
	r.Screen, r.Screens, r.Console = s.png, s.seen, console.Text()
	return r, nil
}

// judge tells what is known; an empty verdict means nothing yet.
func judge(text []byte, life []sign, h *happened) (r CheckResult) {
	// Failures first: a login prompt may be that of an emergency shell, or of a boot
	// before the last restart.
	if name, line := find(text, signsOfFailure); name != "" {
		return CheckResult{Verdict: BootFailed, Reason: name, Line: line}
	}
	if name, line := find(text, life); name != "" {
		return CheckResult{Verdict: Booted, Reason: name, Line: line}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.panicked:
		r = CheckResult{Verdict: BootFailed, Reason: "kernel panic, as its panic device told"}
	case h.shutdown:
		r = CheckResult{Verdict: BootFailed, Reason: "it powered itself off before it was up"}
	case h.resets > maxResets:
		r = CheckResult{Verdict: BootFailed, Reason: fmt.Sprintf("it restarted %d times", h.resets)}
	}
	return r
}

func rest(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// screens looks at a machine's screen now and then.
type screens struct {
	m       *Machine
	file    string
	png     []byte
	sum     [32]byte
	seen    int
	changed time.Time
}

// look takes a picture. A screen that can't be had is no failure of the guest.
func (s *screens) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, screenTime)
	defer cancel()
	if err := s.m.Screenshot(ctx, s.file); err != nil {
		return
	}
	b, err := os.ReadFile(s.file)
	if err := errors.Join(err, os.Remove(s.file)); err != nil || len(b) == 0 {
		return
	}
	if sum := sha256.Sum256(b); s.seen == 0 || sum != s.sum {
		s.png, s.sum, s.changed = b, sum, time.Now()
		s.seen++
	}
}

func (s *screens) state() string {
	if s.seen == 0 {
		return "its screen could not be seen"
	}
	return fmt.Sprintf("its screen changed last %v before", time.Since(s.changed).Round(time.Second))
}
