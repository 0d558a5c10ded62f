package nbd

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// ErrRequestTimeout is wrapped when a client has begun a request and does not
// send the rest.
var ErrRequestTimeout = errors.New("client does not send the rest of its request")

// ErrIdleTimeout is wrapped when a client has sent no request for as long as the
// server allows.
var ErrIdleTimeout = errors.New("client is idle")

// errCrowdedOut ends a connection whose place another one needed more.
var errCrowdedOut = errors.New("client has chosen no export, and its place was needed")

// progress is how a connection gets on with what it receives, for who watches.
// The goroutine that reads writes it: twice per read that may block, so it is
// no more than a word.
type progress struct {
	word  atomic.Uint64 // 0: does not wait; else mark<<2 | what for
	mark  uint64        // counts requests and every 64 KiB
	part  int           // bytes since
	whole bool          // what was received ends with a request
}

const (
	waitsForRequest = 1
	waitsForRest    = 2
)

// waits is called before a read that may block.
func (p *progress) waits(buffered bool) {
	if p.whole && !buffered {
		p.word.Store(p.mark<<2 | waitsForRequest)
	} else {
		p.word.Store(p.mark<<2 | waitsForRest)
	}
}

// got is called after it.
func (p *progress) got(n int) {
	if p.part += n; p.part >= 64<<10 {
		p.part = 0
		p.mark++
	}
	p.word.Store(0)
}

// next is called before the head of a request is waited for, and begun when it is
// there.
func (p *progress) next() { p.whole = true }

func (p *progress) begun() {
	p.whole = false
	p.mark++
}

// watched is what the watcher knows of a connection.
type watched struct {
	word  uint64
	since time.Time
}

// watch cuts off connections that keep the server waiting, until ctx ends. A
// read deadline would do too, but cost two system calls more per request.
func (s *Server) watch(ctx context.Context, g *group) {
	request := or(s.RequestTimeout, DefaultRequestTimeout)
	every := request / 8
	if s.IdleTimeout > 0 {
		every = min(every, s.IdleTimeout/8)
	}
	ticker := time.NewTicker(min(max(every, 5*time.Millisecond), 5*time.Second))
	defer ticker.Stop()
	seen := map[*conn]watched{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now, before := time.Now(), seen
		seen = make(map[*conn]watched, len(before))
		g.each(func(c *conn) {
			word := c.in.word.Load()
			if word == 0 || !c.decided.Load() { // the handshake has a deadline as a whole
				return
			}
			w, ok := before[c]
			busy := word&waitsForRequest != 0 && len(c.slots) > 0 // it waits for us
			if !ok || w.word != word || busy {
				w = watched{word, now}
			}
			seen[c] = w
			switch waited := now.Sub(w.since); {
			case word&waitsForRest != 0 && waited > request:
				c.cutOff(fmt.Errorf("%w for %v", ErrRequestTimeout, request))
			case word&waitsForRequest != 0 && s.IdleTimeout > 0 && waited > s.IdleTimeout:
				c.cutOff(fmt.Errorf("%w for %v", ErrIdleTimeout, s.IdleTimeout))
			}
		})
	}
}
