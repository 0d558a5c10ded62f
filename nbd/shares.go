package nbd

import (
	"context"
	"net/netip"
	"strconv"
	"sync"
)

// shares divides a server among its clients, so that none can have all of it:
// places for connections, and what slow requests hold while they are executed.
//
// A client may hold as much as it leaves free ("dynamic threshold", Choudhury and
// Hahne, 1998): one alone gets half, two get a third each, and something is left
// for who comes next. Beyond that every connection may execute one request of at
// most ownPiece bytes, whatever the others hold.
type shares struct {
	// Limits, constant.
	maxConns, maxPerClient, maxRequests int
	maxBytes                            int64

	mu       sync.Mutex
	of       map[string]*share // those with connections
	conns    int
	requests int
	bytes    int64
	waiting  int
}

// ownPiece is what a request may hold that is always let through.
const ownPiece = dataPiece + bufferSlack

// share is one client's. shares.mu guards it.
type share struct {
	conns    map[*conn]struct{}
	requests int
	bytes    int64
	claims   []*claim // those that wait, in order
}

// claim is a request that waits for its part.
type claim struct {
	bytes   int64
	granted chan struct{} // closed when it was
}

// key is what the connections of one client have in common: the user on a unix
// socket; the address, of IPv6 its network, on TCP.
func (c Client) key() string {
	if c.Unix != nil {
		return "uid " + strconv.FormatUint(uint64(c.Unix.UID), 10)
	}
	ap, err := netip.ParseAddrPort(c.Address)
	if err != nil {
		return c.Network
	}
	if a := ap.Addr().Unmap(); a.Is4() {
		return a.String()
	}
	p, err := ap.Addr().WithZone("").Prefix(64)
	if err != nil {
		return c.Network
	}
	return p.String()
}

// admit gives a connection a place. If there is none, the place of one that has
// not chosen an export yet is taken away: a client that means it does so within
// milliseconds, and those that never do must not keep it out. It is the oldest of
// the client with the most of those. ok is false if there is no such place.
func (s *shares) admit(c *conn) (evicted *conn, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.of[c.client.key()]
	if sh == nil {
		sh = &share{conns: map[*conn]struct{}{}}
	}
	switch {
	case len(sh.conns) >= s.maxPerClient:
		evicted = sh.oldestUndecided()
	case s.conns >= s.maxConns:
		most := 0
		for _, other := range s.of {
			if n := other.undecided(); n > most {
				most, evicted = n, other.oldestUndecided()
			}
		}
	default:
		s.enter(sh, c)
		return nil, true
	}
	if evicted == nil {
		return nil, false
	}
	s.remove(evicted)
	s.enter(sh, c)
	return evicted, true
}

func (s *shares) enter(sh *share, c *conn) {
	c.share = sh
	sh.conns[c] = struct{}{}
	s.of[c.client.key()] = sh
	s.conns++
}

// leave gives the place back, if it was not taken away.
func (s *shares) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(c)
}

func (s *shares) remove(c *conn) {
	if _, ok := c.share.conns[c]; ok {
		delete(c.share.conns, c)
		s.conns--
	}
	if key := c.client.key(); len(c.share.conns) == 0 && s.of[key] == c.share && len(c.share.claims) == 0 {
		delete(s.of, key)
	}
}

func (sh *share) undecided() int {
	n := 0
	for c := range sh.conns {
		if !c.decided.Load() {
			n++
		}
	}
	return n
}

func (sh *share) oldestUndecided() *conn {
	var oldest *conn
	for c := range sh.conns {
		if !c.decided.Load() && (oldest == nil || c.began.Before(oldest.began)) {
			oldest = c
		}
	}
	return oldest
}

// fits tells whether a client may hold n bytes more.
func (s *shares) fits(sh *share, n int64) bool {
	free, freeRequests := s.maxBytes-s.bytes, s.maxRequests-s.requests
	if sh.requests == 0 {
		return n <= free && freeRequests > 0
	}
	return sh.bytes+n <= free && sh.requests+1 <= freeRequests
}

func (s *shares) grant(sh *share, n int64) {
	sh.requests++
	sh.bytes += n
	s.requests++
	s.bytes += n
}

// tryAcquire lets a request of n bytes through if it need not wait.
func (s *shares) tryAcquire(sh *share, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(sh.claims) > 0 || !s.fits(sh, n) {
		return false
	}
	s.grant(sh, n)
	return true
}

// acquire waits until a request of n bytes may be executed.
func (s *shares) acquire(ctx context.Context, sh *share, n int64) error {
	s.mu.Lock()
	if len(sh.claims) == 0 && s.fits(sh, n) {
		s.grant(sh, n)
		s.mu.Unlock()
		return nil
	}
	c := &claim{bytes: n, granted: make(chan struct{})}
	sh.claims = append(sh.claims, c)
	s.waiting++
	s.mu.Unlock()
	select {
	case <-c.granted:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-c.granted:
		return nil // the caller will see that ctx has ended
	default:
	}
	for i, other := range sh.claims {
		if other == c {
			sh.claims = append(sh.claims[:i], sh.claims[i+1:]...)
			s.waiting--
			break
		}
	}
	s.serve() // it may have been in the way of smaller ones
	return ctx.Err()
}

// release gives back what a request of n bytes held.
func (s *shares) release(sh *share, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh.requests--
	sh.bytes -= n
	s.requests--
	s.bytes -= n
	s.serve()
}

// serve grants what fits now, to who holds least first.
func (s *shares) serve() {
	for s.waiting > 0 {
		var least *share
		for _, sh := range s.of {
			if len(sh.claims) == 0 || !s.fits(sh, sh.claims[0].bytes) {
				continue
			}
			if least == nil || sh.bytes < least.bytes || sh.bytes == least.bytes && sh.requests < least.requests {
				least = sh
			}
		}
		if least == nil {
			return
		}
		c := least.claims[0]
		least.claims = least.claims[1:]
		s.waiting--
		s.grant(least, c.bytes)
		close(c.granted)
	}
}
