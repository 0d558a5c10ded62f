package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Whether a point boots is in the object checks/<vm>/<time>-<id>.<n>, beside the point's; the highest n
// counts. What was seen is in that name and ".seen". See docs/format.md.
const (
	checkPrefix = "checks/"
	seenSuffix  = ".seen"

	maxCheckText = 1000    // of each text of a check, in bytes
	maxSeen      = 8 << 20 // console and screen together, in bytes
)

// Verdicts of a Check.
const (
	VerdictBooted  = "booted"
	VerdictFailed  = "failed"
	VerdictUnknown = "unknown" // neither was seen
)

// Check says whether a point came up as a machine. It holds nothing of the guest's content.
type Check struct {
	Number  uint32          `json:"number"` // set when it is kept or read: 1 and up, the highest counts
	Time    time.Time       `json:"time"`   // when the machine was started, UTC
	Verdict string          `json:"verdict"`
	Reason  string          `json:"reason"`            // for a person
	Took    time.Duration   `json:"took_ns"`           // until the verdict
	Machine json.RawMessage `json:"machine,omitempty"` // what it was run on, opaque here
	Tool    string          `json:"tool"`              // name and version of the checker
	Host    string          `json:"host"`
}

// Seen is what a Check was judged by: the guest's content.
type Seen struct {
	Line    string `json:"line,omitempty"` // of the console, that decided it
	Console []byte `json:"console,omitempty"`
	Screen  []byte `json:"screen,omitempty"` // PNG
}

func (c *Check) validate() error {
	switch c.Verdict {
	case VerdictBooted, VerdictFailed, VerdictUnknown:
	default:
		return fmt.Errorf("%w: verdict %q", ErrInvalid, c.Verdict)
	}
	for _, s := range []string{c.Reason, c.Tool, c.Host} {
		if len(s) > maxCheckText {
			return fmt.Errorf("%w: a check's text of %d bytes, the most is %d", ErrInvalid, len(s), maxCheckText)
		}
	}
	return nil
}

func (r *reader) checkObject(n PointName, number uint32) string {
	return fmt.Sprintf("%s.%d", checkPrefix+strings.TrimPrefix(r.pointObject(n), pointPrefix), number)
}

// parseCheckObject reads the names of verdicts and of what was seen.
func (r *reader) parseCheckObject(object string) (n PointName, number uint32, seen, ok bool) {
	base, seen := strings.CutSuffix(object, seenSuffix)
	at := strings.LastIndexByte(base, '.')
	if at < 0 || !strings.HasPrefix(base, checkPrefix) {
		return n, 0, false, false
	}
	i, err := strconv.ParseUint(base[at+1:], 10, 32)
	if err != nil {
		return n, 0, false, false
	}
	n, ok = r.parsePointName(pointPrefix + strings.TrimPrefix(base[:at], checkPrefix))
	return n, uint32(i), seen, ok && r.checkObject(n, uint32(i)) == base
}

// KeepCheck adds a check to a point and returns it as it is kept. What was seen is there before the verdict. The
// error wraps ErrNotFound if the point is gone. A key that may write is enough; in an encrypted
// repository only one that may read content can read what was seen.
func (r *Repo) KeepCheck(ctx context.Context, n PointName, c Check, seen Seen) (Check, error) {
	fail := func(err error) (Check, error) { return Check{}, fmt.Errorf("keep the check of %s: %w", n, err) }
	c.Time = c.Time.UTC().Round(0)
	if c.Host == "" {
		c.Host = thisProcess().Host
	}
	if err := c.validate(); err != nil {
		return fail(err)
	}
	if size := len(seen.Line) + len(seen.Console) + len(seen.Screen); size > maxSeen {
		return fail(fmt.Errorf("%w: %d bytes were seen, the most is %d", ErrInvalid, size, maxSeen))
	}
	// What is sealed to readers is so with the newest keys.
	if err := r.keys.refresh(ctx, r.blobs); err != nil {
		return fail(err)
	}
	names, err := r.names(ctx, r.checksOf(n))
	if err != nil {
		return fail(err)
	}
	for _, name := range names {
		if of, number, _, ok := r.parseCheckObject(name); ok && of == n {
			c.Number = max(c.Number, number)
		}
	}
	for {
		c.Number++
		object := r.checkObject(n, c.Number)
		err := r.putSeen(ctx, object+seenSuffix, seen)
		if err == nil {
			err = r.putDocument(ctx, object, "check", c)
		}
		if errors.Is(err, ErrExists) {
			continue // somebody else's
		}
		if err != nil {
			return fail(err)
		}
		break
	}
	// Whoever forgets the point deletes its checks last.
	there, err := r.exists(ctx, r.pointObject(n))
	if err == nil && !there {
		err = errors.Join(fmt.Errorf("the point: %w", ErrNotFound), r.dropChecks(ctx, n))
	}
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// checksOf is the beginning of the names of a point's checks.
func (r *reader) checksOf(n PointName) string {
	return strings.TrimSuffix(r.checkObject(n, 0), "0")
}

// Checks returns the newest check of each of a VM's points that has one. It costs one listing, and one read for each.
// One that can't be read is of verdict unknown.
func (r *Repo) Checks(ctx context.Context, vm string) (map[PointName]Check, error) {
	newest, err := r.newestChecks(ctx, vm)
	if err != nil {
		return nil, err
	}
	out := map[PointName]Check{}
	for n, number := range newest {
		c, err := r.check(ctx, n, number)
		if errors.Is(err, ErrNotFound) {
			continue // forgotten since
		}
		if err != nil {
			return nil, err
		}
		out[n] = c
	}
	return out, nil
}

func (r *Repo) newestChecks(ctx context.Context, vm string) (map[PointName]uint32, error) {
	if err := ValidVM(vm); err != nil {
		return nil, err
	}
	newest := map[PointName]uint32{}
	for info, err := range r.blobs.List(ctx, checkPrefix+r.folder(vm)+"/") {
		if err != nil {
			return nil, err
		}
		if n, number, seen, ok := r.parseCheckObject(info.Name); ok && !seen {
			newest[n] = max(newest[n], number)
		}
	}
	return newest, nil
}

func (r *Repo) check(ctx context.Context, n PointName, number uint32) (Check, error) {
	var c Check
	err := r.document(ctx, r.checkObject(n, number), "check", &c)
	if err == nil {
		err = c.validate()
		if err == nil && c.Number == number {
			return c, nil
		}
		err = &CorruptError{r.checkObject(n, number), "it is no check, or another one"}
	}
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrVersion) {
		return Check{Number: number, Verdict: VerdictUnknown, Reason: "the check can't be read: " + err.Error()}, nil
	}
	return Check{}, err
}

// SeenBy returns what a check of a point was judged by. The error wraps ErrNotFound if that is gone, ErrWriterKey if
// the repository's key can't read content.
func (r *Repo) SeenBy(ctx context.Context, n PointName, c Check) (Seen, error) {
	s, err := r.getSeen(ctx, r.checkObject(n, c.Number)+seenSuffix)
	if err != nil {
		return Seen{}, fmt.Errorf("what was seen of %s: %w", n, err)
	}
	return s, nil
}

// dropChecks deletes the checks of a point.
func (r *Repo) dropChecks(ctx context.Context, n PointName) error {
	names, err := r.names(ctx, r.checksOf(n))
	if err != nil {
		return err
	}
	return r.removed(ctx, slices.DeleteFunc(names, func(name string) bool {
		of, _, _, ok := r.parseCheckObject(name)
		return !ok || of != n
	})...)
}

// provenWord names the newest point that is known to boot, as latest names the newest.
const provenWord = "proven"

// proven returns the newest of names whose newest check says that it boots. They are of one VM, ascending and not
// empty.
func (r *Repo) proven(ctx context.Context, names []PointName) (PointName, error) {
	newest, err := r.newestChecks(ctx, names[0].VM)
	if err != nil {
		return PointName{}, err
	}
	for _, n := range slices.Backward(names) {
		number, checked := newest[n]
		if !checked {
			continue
		}
		c, err := r.check(ctx, n, number)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return PointName{}, err
		}
		if err == nil && c.Verdict == VerdictBooted {
			return n, nil
		}
	}
	return PointName{}, fmt.Errorf("%w: no point of %s is known to boot: `tidemark boot --verify` finds out", ErrNotFound, names[0].VM)
}
