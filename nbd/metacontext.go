package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/tidemark/tidemark/restore"
)

// The metadata contexts. Section "The base: metadata namespace", and
// docs/interop/nbd.rst of QEMU for its own.
const (
	contextBase       = "base:"
	contextAllocation = "base:allocation"
	contextQEMU       = "qemu:"
	contextDepth      = "qemu:allocation-depth"
	contextDirty      = "qemu:dirty-bitmap:" // followed by a name of the export's History
)

// stateDirty is the status flag of contextDirty.
const stateDirty = 1 << 0

// maxContexts is how many queries one option may bring, and so how many contexts
// a connection may select.
const maxContexts = 64

// statusContext is a metadata context that was selected for a connection.
type statusContext struct {
	name    string // as the client asked for it
	id      uint32
	runs    func(ctx context.Context, off, n int64) iter.Seq2[statusRun, error]
	release func()
}

// errUnknownContext is wrapped when an export has no context of a name.
var errUnknownContext = errors.New("unknown metadata context")

// openContext opens the context of exactly this name. It uses the export until it
// is released.
func openContext(ctx context.Context, e *Export, name string) (*statusContext, error) {
	s := &statusContext{name: name, release: func() {}}
	disk := e.Disk
	past, isDirty := strings.CutPrefix(name, contextDirty)
	switch {
	case name == contextAllocation:
		s.runs = func(ctx context.Context, off, n int64) iter.Seq2[statusRun, error] {
			return allocation(ctx, disk, off, n)
		}
	case name == contextDepth:
		s.runs = func(ctx context.Context, off, n int64) iter.Seq2[statusRun, error] { return depth(ctx, disk, off, n) }
	case isDirty && past != "" && e.History != nil:
		differ, ok := disk.(restore.Differ)
		if !ok {
			return nil, fmt.Errorf("%w %q", errUnknownContext, name)
		}
		old, release, err := e.History.Open(ctx, past)
		if errors.Is(err, ErrUnknownPast) {
			return nil, fmt.Errorf("%w %q: %w", errUnknownContext, name, err)
		}
		if err != nil {
			return nil, err
		}
		s.release = release
		s.runs = func(ctx context.Context, off, n int64) iter.Seq2[statusRun, error] {
			return dirty(ctx, differ, old, off, n)
		}
	default:
		return nil, fmt.Errorf("%w %q", errUnknownContext, name)
	}
	return s, nil
}

// allocation is the status in base:allocation.
func allocation(ctx context.Context, d restore.Disk, off, n int64) iter.Seq2[statusRun, error] {
	return func(yield func(statusRun, error) bool) {
		for e, err := range d.Extents(ctx, off, n) {
			r := statusRun{off: e.Off, n: e.Len}
			if e.Zero {
				r.status = stateHole | stateZero
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

// depth is the status in qemu:allocation-depth.
func depth(ctx context.Context, d restore.Disk, off, n int64) iter.Seq2[statusRun, error] {
	return func(yield func(statusRun, error) bool) {
		for l, err := range restore.Layers(ctx, d, off, n) {
			if !yield(statusRun{l.Off, l.Len, uint32(l.Depth)}, err) {
				return
			}
		}
	}
}

// dirty is the status in a qemu:dirty-bitmap. What it does not mention is clean.
func dirty(ctx context.Context, d restore.Differ, old restore.Disk, off, n int64) iter.Seq2[statusRun, error] {
	return func(yield func(statusRun, error) bool) {
		for c, err := range d.Diff(ctx, old, off, n) {
			if !yield(statusRun{c.Off, c.Len, stateDirty}, err) {
				return
			}
		}
	}
}

// metaContext answers NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT.
func (n *negotiation) metaContext(ctx context.Context, option uint32, data []byte) {
	if option == optSetMetaContext {
		n.forgetContexts() // a failed selection clears the last one too
	}
	if !n.headers.chunked() {
		n.refuse(option, repErrInvalid, "structured replies or extended headers come first")
		return
	}
	name, queries, ok := parseMetaContext(data)
	if !ok || !validString(name) {
		n.refuse(option, repErrInvalid, "malformed option")
		return
	}
	if len(queries) > maxContexts {
		n.refuse(option, repErrTooBig, "too many queries")
		return
	}
	e, err := open(ctx, n.srv.Exports, n.client, name)
	if err != nil {
		n.refuseOpen(option, err)
		return
	}
	if option == optListMetaContext {
		defer e.release()
		names, err := listContexts(ctx, &e, queries)
		if err != nil {
			n.refuseContexts(option, &e, err)
			return
		}
		for _, name := range names {
			n.replyContext(option, 0, name) // the ID is reserved
		}
		n.reply(option, repAck, nil)
		return
	}
	contexts, err := selectContexts(ctx, &e, queries)
	if err != nil {
		n.refuseContexts(option, &e, err)
		e.release()
		return
	}
	n.selected = selection{name: name, export: e, contexts: contexts, valid: true}
	for _, s := range contexts {
		n.replyContext(option, s.id, s.name)
	}
	n.reply(option, repAck, nil)
}

func (n *negotiation) replyContext(option, id uint32, name string) {
	n.reply(option, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), name...))
}

func (n *negotiation) refuseContexts(option uint32, e *Export, err error) {
	n.srv.logger().Error("nbd: metadata contexts", "export", e.Name, "error", err)
	n.refuse(option, repErrUnknown, "metadata contexts are not available")
}

// selection is what NBD_OPT_SET_META_CONTEXT has selected last. It holds the export
// open, so that a name that leads elsewhere later still means the same one when the
// client enters it.
type selection struct {
	name     string // as the client asked for it
	export   Export
	contexts []*statusContext
	valid    bool
}

// forgetContexts undoes the selection.
func (n *negotiation) forgetContexts() {
	if !n.selected.valid {
		return
	}
	for _, s := range n.selected.contexts {
		s.release()
	}
	n.selected.export.release()
	n.selected = selection{}
}

// openAgain opens an export, or returns the one for which contexts were selected if
// that is meant. The caller need not release it if it is.
func (n *negotiation) openAgain(ctx context.Context, name string) (e Export, isSelected bool, err error) {
	if n.selected.valid && n.selected.name == name {
		return n.selected.export, true, nil
	}
	e, err = open(ctx, n.srv.Exports, n.client, name)
	if err == nil && n.selected.valid && e.Name == n.selected.export.Name { // by another of its names
		e.release()
		return n.selected.export, true, nil
	}
	return e, false, err
}

// selectContexts opens the contexts that the queries name, each once. Others MUST
// be ignored, and so are wildcards.
func selectContexts(ctx context.Context, e *Export, queries []string) (list []*statusContext, err error) {
	for _, q := range queries {
		if slices.ContainsFunc(list, func(s *statusContext) bool { return s.name == q }) {
			continue
		}
		s, err := openContext(ctx, e, q)
		if errors.Is(err, errUnknownContext) {
			continue
		}
		if err != nil {
			for _, s := range list {
				s.release()
			}
			return nil, err
		}
		s.id = uint32(len(list) + 1)
		list = append(list, s)
	}
	return list, nil
}

// listContexts names the contexts that one of the queries fits: exactly, or as a
// wildcard; all if there is no query.
func listContexts(ctx context.Context, e *Export, queries []string) ([]string, error) {
	wanted := func(name string, wildcards ...string) bool {
		return len(queries) == 0 || slices.Contains(queries, name) ||
			slices.ContainsFunc(wildcards, func(w string) bool { return slices.Contains(queries, w) })
	}
	var names []string
	if wanted(contextAllocation, contextBase) {
		names = append(names, contextAllocation)
	}
	if wanted(contextDepth, contextQEMU) {
		names = append(names, contextDepth)
	}
	if _, ok := e.Disk.(restore.Differ); !ok || e.History == nil {
		return names, nil
	}
	if wanted(contextDirty, contextQEMU) {
		pasts, err := e.History.List(ctx)
		if err != nil {
			return nil, err
		}
		for _, past := range pasts {
			names = append(names, contextDirty+past)
		}
	}
	for _, q := range queries { // those that exist and are not listed
		if !strings.HasPrefix(q, contextDirty) || slices.Contains(names, q) {
			continue
		}
		s, err := openContext(ctx, e, q)
		if errors.Is(err, errUnknownContext) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.release()
		names = append(names, q)
	}
	return names, nil
}

// parseMetaContext decodes the data of both options: the export and the queries.
func parseMetaContext(p []byte) (name string, queries []string, ok bool) {
	name, p, ok = cutString(p)
	if !ok || len(p) < 4 {
		return "", nil, false
	}
	count := binary.BigEndian.Uint32(p)
	p = p[4:]
	for ; count > 0; count-- { // ends by itself: every query takes 4 bytes of p
		var q string
		if q, p, ok = cutString(p); !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(p) == 0
}
