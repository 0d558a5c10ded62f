package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A session tells garbage collections of a backup that is under way, see
// docs/gc.md. Its objects are
//
//	sessions/<time>-<16 hex>        begun: which maps the backup builds on
//	sessions/<time>-<16 hex>.end    how it ends. Created by the writer before it publishes
//	                                its point, or by a collection that gives it up: the
//	                                first one decides
//	sessions/<time>-<16 hex>.done   the point was published
//
// A writer only creates them. Collections delete them.
const (
	sessionPrefix = "sessions/"
	endSuffix     = ".end"
	doneSuffix    = ".done"

	// SessionDeadline is how long a backup may take before a garbage collection gives
	// it up, if it cannot tell whether it still runs.
	SessionDeadline = 7 * 24 * time.Hour
)

// ErrGivenUp is wrapped by Commit when a garbage collection has given the backup
// up. Nothing was published.
var ErrGivenUp = errors.New("given up by a garbage collection")

// rootRef is where the map of one disk begins.
type rootRef struct {
	Ref   Ref   `json:"ref"`
	Level uint8 `json:"level"`
}

func rootRefs(p *Point) []rootRef {
	if p == nil {
		return nil
	}
	var out []rootRef
	for i := range p.Disks {
		if root := p.Disks[i].Root; !root.Ref.IsZero() {
			out = append(out, rootRef{root.Ref, root.Level})
		}
	}
	return out
}

type sessionDoc struct {
	VM       string    `json:"vm"`
	Start    time.Time `json:"start"`
	Deadline time.Time `json:"deadline"`
	Process  process   `json:"process"`
	Parent   string    `json:"parent,omitempty"` // object
	Roots    []rootRef `json:"roots,omitempty"`  // of the parent
}

// How a session ends.
const (
	endCommit    = "commit"    // its point will be published
	endAbandoned = "abandoned" // the writer says that there will be none
	endGivenUp   = "given-up"  // a collection says so
)

type sessionEnd struct {
	How   string    `json:"how"`
	Time  time.Time `json:"time"`
	Point string    `json:"point,omitempty"` // object
	Roots []rootRef `json:"roots,omitempty"` // of the point
}

// writing is the session of a Writer. Not for concurrent use, but for condemned.
type writing struct {
	repo      *Repo
	name      string
	ended     bool
	condemned map[PackID]struct{} // packs that nothing new may refer to; immutable
}

// newDocumentName returns a name that sorts by time, for people, and is unique.
func newDocumentName(prefix string, t time.Time) string {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	return fmt.Sprintf("%s%s-%x", prefix, t.UTC().Format("20060102T150405Z"), id)
}

// beginSession announces a backup of vm that builds on parent, which may be nil. It
// returns nil if the parent was deleted meanwhile: then another one must be found.
//
// The order is what a collection relies on: the session is there before the parent
// is seen to be there still, and before the condemned packs are listed.
func (r *Repo) beginSession(ctx context.Context, vm string, parent *Point) (*writing, error) {
	now := time.Now()
	s := &writing{repo: r, name: newDocumentName(sessionPrefix, now)}
	doc := sessionDoc{VM: vm, Start: now.UTC(), Deadline: now.Add(SessionDeadline).UTC(), Process: thisProcess(), Roots: rootRefs(parent)}
	if parent != nil {
		doc.Parent = r.pointObject(parent.Name())
	}
	if err := r.putDocument(ctx, s.name, "session", doc); err != nil {
		return nil, fmt.Errorf("announce the backup: %w", err)
	}
	if parent != nil {
		there, err := r.exists(ctx, doc.Parent)
		if err != nil || !there {
			s.abandon(ctx)
			return nil, err
		}
	}
	var err error
	if s.condemned, err = r.condemned(ctx); err != nil {
		s.abandon(ctx)
		return nil, fmt.Errorf("list condemned packs: %w", err)
	}
	return s, nil
}

// commit decides that p will be published. All that p refers to must be durable. The error
// wraps ErrGivenUp if it must not be.
func (s *writing) commit(ctx context.Context, p *Point) error {
	end := sessionEnd{How: endCommit, Time: time.Now().UTC(), Point: s.repo.pointObject(p.Name()), Roots: rootRefs(p)}
	err := s.repo.putDocument(ctx, s.name+endSuffix, "session-end", end)
	s.ended = err == nil
	if errors.Is(err, ErrExists) {
		s.ended = true
		return fmt.Errorf("%w (%s%s): what it had written may be deleted; back up again", ErrGivenUp, s.name, endSuffix)
	}
	return err
}

// stillOpen fails if the session has an end.
func (s *writing) stillOpen(ctx context.Context) error {
	there, err := s.repo.exists(ctx, s.name+endSuffix)
	if there {
		return fmt.Errorf("%w (%s%s)", ErrGivenUp, s.name, endSuffix)
	}
	return err
}

// blame adds to the error of a backup that it was given up, if it was: then what it builds on may be
// deleted already.
func (s *writing) blame(ctx context.Context, err error) error {
	if s.ended || errors.Is(err, ErrGivenUp) {
		return err
	}
	if there, serr := s.repo.exists(ctx, s.name+endSuffix); serr != nil || !there {
		return err
	}
	return fmt.Errorf("%w (%s%s): %w", ErrGivenUp, s.name, endSuffix, err)
}

// done says that the point was published. It only saves collections from wondering, so
// that it fails changes nothing.
func (s *writing) done(ctx context.Context) {
	_ = s.repo.putDocument(ctx, s.name+doneSuffix, "session-done", struct{}{})
}

// abandon says that there will be no point, unless the session has ended. Without it a
// collection finds out, or waits.
func (s *writing) abandon(ctx context.Context) {
	if s.ended {
		return
	}
	s.ended = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	_ = s.repo.putDocument(ctx, s.name+endSuffix, "session-end", sessionEnd{How: endAbandoned, Time: time.Now().UTC()})
}

// sessionState is what a listing shows of one session.
type sessionState struct {
	name  string
	begun *sessionDoc // nil if its object is gone
	end   *sessionEnd // nil if it is open
	done  bool
}

// roots are the maps that the session keeps alive: while it is open those of the parent,
// which its point may share; then those of the point, until that protects them
// itself.
func (s *sessionState) roots() []rootRef {
	switch {
	case s.end != nil:
		return s.end.Roots
	case s.begun != nil:
		return s.begun.Roots
	}
	return nil
}

func (s *sessionState) isOpen() bool { return s.end == nil && s.begun != nil }

// sessions lists all sessions with their documents. One that is damaged is an
// error: nothing may be deleted when it is not known what it protects.
func (r *Repo) sessions(ctx context.Context) ([]*sessionState, error) {
	names, err := r.names(ctx, sessionPrefix)
	if err != nil {
		return nil, err
	}
	byName := map[string]*sessionState{}
	var out []*sessionState
	for _, object := range names {
		name := strings.TrimSuffix(strings.TrimSuffix(object, endSuffix), doneSuffix)
		s := byName[name]
		if s == nil {
			s = &sessionState{name: name}
			byName[name] = s
			out = append(out, s)
		}
		var err error
		switch {
		case strings.HasSuffix(object, doneSuffix):
			s.done = true
		case strings.HasSuffix(object, endSuffix):
			var d sessionEnd
			if err = r.document(ctx, object, "session-end", &d); err == nil {
				s.end = &d
			}
		default:
			var d sessionDoc
			if err = r.document(ctx, object, "session", &d); err == nil {
				s.begun = &d
			}
		}
		// Deleted since it was listed: its point was published before this listing
		// began, or never will be.
		if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	return out, nil
}

// giveUp ends an open session unless its writer does so first. It returns the end that
// counts.
func (r *Repo) giveUp(ctx context.Context, s *sessionState) error {
	end := sessionEnd{How: endGivenUp, Time: time.Now().UTC()}
	err := r.putDocument(ctx, s.name+endSuffix, "session-end", end)
	if errors.Is(err, ErrExists) {
		err = r.document(ctx, s.name+endSuffix, "session-end", &end)
	}
	if err != nil {
		return fmt.Errorf("give up %s: %w", s.name, err)
	}
	s.end = &end
	return nil
}

// isLost tells whether an open session may be given up: its process is gone, its time is over,
// or it is older than the operator wants to wait for. That only costs a backup.
func (s *sessionState) isLost(now time.Time, patience time.Duration) bool {
	d := s.begun
	return d.Process.isGone() || now.After(d.Deadline) || patience > 0 && now.Sub(d.Start) > patience
}

// keepFence is how long the end of a session stays that may still have a writer: one that
// was given up, or has said that it will publish and was not seen to.
const keepFence = 90 * 24 * time.Hour

// isOver tells whether a session protects nothing any more, so that its objects may
// be deleted. published tells whether an object of that name exists.
func (s *sessionState) isOver(ctx context.Context, now time.Time, published func(context.Context, string) (bool, error)) (bool, error) {
	switch {
	case s.end == nil:
		return s.begun == nil && s.done, nil // what an interrupted deletion left
	case s.end.How == endAbandoned, s.done, now.Sub(s.end.Time) > keepFence:
		return true, nil
	case s.end.How != endCommit:
		return false, nil
	}
	if there, err := published(ctx, s.end.Point); there || err != nil {
		return there, err
	}
	// It died between the two, or its point is forgotten already. An hour: a request may
	// still be under way.
	return s.begun != nil && s.begun.Process.isGone() && now.Sub(s.end.Time) > time.Hour, nil
}

// dropSession deletes a session that is over. Any part that an interruption leaves is
// deleted by the next collection.
func (r *Repo) dropSession(ctx context.Context, s *sessionState) error {
	return r.removed(ctx, s.name, s.name+endSuffix, s.name+doneSuffix)
}
