package testvm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Line is one line of a guest's console.
type Line struct {
	N    int       // counts from 0
	Time time.Time // when it was read, on the host's clock
	Text string    // without the line end; cut after 4 KiB
}

// ErrEnded is wrapped when a VM ended before it said what was waited for.
var ErrEnded = errors.New("VM ended")

const (
	maxLine  = 4 << 10
	maxLines = 1 << 16 // older ones are forgotten
)

// console collects what a guest prints.
type console struct {
	mu    sync.Mutex
	lines []Line
	next  int           // N of the next line
	more  chan struct{} // closed and replaced at every line and at the end
	ended bool
}

func newConsole() *console { return &console{more: make(chan struct{})} }

// readFrom takes lines until r ends.
func (c *console) readFrom(r io.Reader, copyTo io.Writer) {
	in := bufio.NewReaderSize(r, maxLine)
	for {
		b, err := in.ReadSlice('\n')
		if len(b) > 0 {
			if copyTo != nil {
				_, _ = copyTo.Write(b) // who wants a copy has to care for it
			}
			c.add(strings.TrimRight(string(b), "\r\n"))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	close(c.more)
}

func (c *console) add(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines = append(c.lines, Line{N: c.next, Time: time.Now(), Text: text})
	c.next++
	if len(c.lines) > maxLines {
		c.lines = append(c.lines[:0], c.lines[maxLines/4:]...)
	}
	close(c.more)
	c.more = make(chan struct{})
}

// from returns a copy of the lines from number n on, a channel that closes when
// there are more, and whether there will be none.
func (c *console) from(n int) ([]Line, <-chan struct{}, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	skip := 0
	if len(c.lines) > 0 {
		skip = min(max(n-c.lines[0].N, 0), len(c.lines))
	}
	return append([]Line(nil), c.lines[skip:]...), c.more, c.ended
}

// wait returns the first line from number n on that matches.
func (c *console) wait(ctx context.Context, n int, re *regexp.Regexp) (Line, error) {
	for {
		lines, more, ended := c.from(n)
		for _, l := range lines {
			if re.MatchString(l.Text) {
				return l, nil
			}
			n = l.N + 1
		}
		if ended {
			return Line{}, fmt.Errorf("%w before it printed %q", ErrEnded, re)
		}
		select {
		case <-ctx.Done():
			return Line{}, fmt.Errorf("waiting for %q on the console: %w", re, ctx.Err())
		case <-more:
		}
	}
}
