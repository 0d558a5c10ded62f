package nbd

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/tidemark/tidemark/restore"
)

// ErrRule is wrapped when a rule of access makes no sense.
var ErrRule = errors.New("bad rule")

// Rule lets clients see exports.
type Rule struct {
	kind    string // "*" for everybody, or as in Client.Names, or UID or GID
	who     string // pattern; a number for UID and GID
	exports string // pattern
}

// ParseRule reads WHO:EXPORTS. WHO is * for everybody, KIND=NAME with the kinds
// of [Client.Names] for who has shown a certificate, UID=USER or GID=GROUP (names
// or numbers) for the process at a unix socket; of groups it counts the one
// that the process has as its own, not the others that it is in. EXPORTS is the
// name of an export. A * in either stands for any text, also none. What is
// behind the last colon is EXPORTS. Errors wrap [ErrRule].
func ParseRule(s string) (Rule, error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || i == len(s)-1 {
		return Rule{}, fmt.Errorf("%w %q: must be WHO:EXPORTS, such as 'CN=standby1:web1@*'", ErrRule, s)
	}
	who, exports := s[:i], s[i+1:]
	if who == "*" {
		return Rule{kind: "*", exports: exports}, nil
	}
	kind, name, _ := strings.Cut(who, "=")
	r := Rule{kind: strings.ToUpper(kind), who: name, exports: exports}
	if name == "" {
		return Rule{}, fmt.Errorf("%w %q: WHO must be *, or KIND=NAME with CN, DNS, IP, EMAIL, URI, UID or GID", ErrRule, s)
	}
	switch r.kind {
	case "CN", "DNS", "IP", "EMAIL", "URI":
		return r, nil
	case "UID":
		if u, err := user.Lookup(name); err == nil {
			r.who = u.Uid
		}
	case "GID":
		if g, err := user.LookupGroup(name); err == nil {
			r.who = g.Gid
		}
	default:
		return Rule{}, fmt.Errorf("%w %q: kind %q is none of CN, DNS, IP, EMAIL, URI, UID, GID", ErrRule, s, kind)
	}
	if _, err := strconv.ParseUint(r.who, 10, 32); err != nil {
		return Rule{}, fmt.Errorf("%w %q: there is no %s %q on this host", ErrRule, s, strings.ToLower(kind), name)
	}
	return r, nil
}

// allows tells whether the rule lets the client see an export.
func (r Rule) allows(c Client, export string) bool {
	if !match(r.exports, export) {
		return false
	}
	switch r.kind {
	case "*":
		return true
	case "UID":
		return c.Unix != nil && r.who == strconv.FormatUint(uint64(c.Unix.UID), 10)
	case "GID":
		return c.Unix != nil && r.who == strconv.FormatUint(uint64(c.Unix.GID), 10)
	}
	return slices.ContainsFunc(c.Names(), func(n string) bool {
		kind, name, _ := strings.Cut(n, "=")
		if kind == "DNS" {
			return r.kind == kind && match(strings.ToLower(r.who), strings.ToLower(name))
		}
		return r.kind == kind && match(r.who, name)
	})
}

// Restrict shows of a set of exports to each client what one of the rules
// allows. The others are to it as if they were not there.
func Restrict(from Exports, rules ...Rule) Exports { return restricted{from, slices.Clone(rules)} }

type restricted struct {
	from  Exports
	rules []Rule
}

func (r restricted) allows(c Client, name string) bool {
	return slices.ContainsFunc(r.rules, func(r Rule) bool { return r.allows(c, name) })
}

// Open implements [Exports]. What the client must not see is not asked for, so
// that the time an answer takes tells nothing either.
func (r restricted) Open(ctx context.Context, c Client, name string) (Export, error) {
	if !r.allows(c, name) {
		return Export{}, fmt.Errorf("%w %q", ErrUnknownExport, name)
	}
	e, err := r.from.Open(ctx, c, name)
	if e.History != nil {
		e.History = restrictedHistory{e.History, func(past string) bool { return r.allowsPast(c, e.Name, past) }}
	}
	return e, err
}

// allowsPast tells whether a client may compare the disk of an export with another
// point of it. Of an export VM@POINT/DISK those may be that are exports it may see.
func (r restricted) allowsPast(c Client, export, past string) bool {
	vm, rest, ok := strings.Cut(export, "@")
	if !ok {
		return true // an export of one disk, which a rule has allowed
	}
	_, disk, _ := strings.Cut(rest, "/")
	return r.allows(c, vm+"@"+past+"/"+disk)
}

type restrictedHistory struct {
	History
	may func(name string) bool
}

// List implements [History].
func (h restrictedHistory) List(ctx context.Context) ([]string, error) {
	list, err := h.History.List(ctx)
	return slices.DeleteFunc(list, func(name string) bool { return !h.may(name) }), err
}

// Open implements [History].
func (h restrictedHistory) Open(ctx context.Context, name string) (restore.Disk, func(), error) {
	if !h.may(name) {
		return nil, nil, fmt.Errorf("%w %q", ErrUnknownPast, name)
	}
	return h.History.Open(ctx, name)
}

// List implements [Exports].
func (r restricted) List(ctx context.Context, c Client) ([]Listing, error) {
	list, err := r.from.List(ctx, c)
	return slices.DeleteFunc(list, func(l Listing) bool { return !r.allows(c, l.Name) }), err
}

// match tells whether s fits a pattern in which * stands for any text.
func match(pattern, s string) bool {
	first, rest, star := strings.Cut(pattern, "*")
	if !star {
		return s == pattern
	}
	if !strings.HasPrefix(s, first) {
		return false
	}
	s = s[len(first):]
	for {
		first, rest, star = strings.Cut(rest, "*")
		if !star {
			return strings.HasSuffix(s, first)
		}
		i := strings.Index(s, first)
		if i < 0 {
			return false
		}
		s = s[i+len(first):]
	}
}
