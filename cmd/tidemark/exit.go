package main

import (
	"context"
	"errors"
	"strings"

	"github.com/tidemark/tidemark/agent"
	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/cbt"
	"github.com/tidemark/tidemark/nbd"
	"github.com/tidemark/tidemark/nbd/kernel"
	"github.com/tidemark/tidemark/restore"
	"github.com/tidemark/tidemark/store"
	"github.com/tidemark/tidemark/vm"
)

// Exit codes; `tidemark help exit-codes` says the same.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnsupported = 3   // this host, or this user, can't
	exitBusy        = 4   // another tidemark process is at it: try again
	exitCorrupt     = 5   // damage was found
	exitUnrecorded  = 6   // an audit found a change that was not recorded
	exitNoAudit     = 7   // there is nothing an audit could compare with
	exitKey         = 8   // no key, or one that may not do this; or no encryption
	exitNotBooted   = 9   // a boot check did not see the VM come up
	exitInterrupted = 130 // by a signal
)

// usageError marks errors of the command line itself.
type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

// errProblems ends a command whose findings were printed already.
var errProblems = errors.New("problems were found")

func exitCode(ctx context.Context, err error) int {
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, agent.ErrUnrecorded):
		return exitUnrecorded // whatever else went wrong
	case errors.As(err, &usage), errors.Is(err, agent.ErrQuiesceSyntax), errors.Is(err, agent.ErrConfig):
		return exitUsage
	case errors.Is(err, bpf.ErrPermission), errors.Is(err, bpf.ErrNoBTF), errors.Is(err, bpf.ErrOldKernel), errors.Is(err, bpf.ErrUntrackable), errors.Is(err, bpf.ErrNoFileHooks), errors.Is(err, errFormat), errors.Is(err, errNoQemuImg), errors.Is(err, vm.ErrUnsupported),
		errors.Is(err, kernel.ErrNoDriver), errors.Is(err, kernel.ErrPermission), errors.Is(err, kernel.ErrGeometry):
		return exitUnsupported
	case errors.Is(err, bpf.ErrBusy), errors.Is(err, store.ErrLocked), errors.Is(err, restore.ErrBusy), errors.Is(err, restore.ErrOverlayBusy), errors.Is(err, kernel.ErrBusy):
		return exitBusy
	case errors.Is(err, store.ErrKey), errors.Is(err, store.ErrNotEncrypted), errors.Is(err, store.ErrWriterKey):
		return exitKey
	case errors.Is(err, errNotBooted):
		return exitNotBooted
	case errors.Is(err, store.ErrCorrupt), errors.Is(err, errProblems), errors.Is(err, restore.ErrReadBack):
		return exitCorrupt
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.Is(err, agent.ErrNotAuditable), errors.Is(err, cbt.ErrUnproven):
		return exitNoAudit
	}
	return exitFailed
}

// message adds what to do next, where that is known.
func message(err error) string {
	hints := []struct {
		err  error
		hint string
	}{
		{agent.ErrUnrecorded, "make a backup now: it compares the whole disk. Keep the evidence. Does something write below the device, or from another host? If not, this is a bug of the worst kind: report it"},
		{agent.ErrNotAuditable, "`tidemark backup` makes a point that an audit can be held against"},
		{cbt.ErrUnproven, "so nothing was compared: the next `tidemark backup` reads the whole disk, and after it an audit is possible again"},
		{bpf.ErrPermission, "run it as root, or with sudo"},
		{bpf.ErrNoBTF, "run `tidemark doctor` to see what this kernel can do"},
		{bpf.ErrOldKernel, "run `tidemark doctor` to see what this kernel can do"},
		{bpf.ErrUnusable, "what it tracks can be used and saved by the version that attached it alone. The next `tidemark track` or `tidemark backup` of this one attaches its own in its place, and compares each disk once; `tidemark untrack --all` removes it"},
		{bpf.ErrNotAttached, "`tidemark track DEVICE` attaches it"},
		{bpf.ErrBusy, "wait for the backup that is running, or see `tidemark status`"},
		{kernel.ErrNoDriver, "`modprobe nbd` loads it, if this kernel has it; `tidemark export` serves the disk to QEMU, nbdcopy and others without it"},
		{kernel.ErrPermission, "run it as root, or with sudo"},
		{kernel.ErrBusy, "choose another --device, or give none; `tidemark detach` detaches it"},
		{nbd.ErrNeedsTLS, "the kernel's client has none: let the server listen on a unix socket or a tunnel"},
		{store.ErrPinned, "`tidemark unpin NAME@POINT` lets it be forgotten"},
		{store.ErrGivenUp, "the next backup makes a new point; if backups take longer, give `tidemark gc --give-up` more time"},
		{store.ErrLocked, "wait for what is running: a backup of this VM, or a garbage collection"},
		{store.ErrNotRepository, "`tidemark init -r REPO` makes one"},
		{errNoQemuImg, "install it (Debian: qemu-utils), or restore to a raw file"},
		{restore.ErrReadBack, "the target does not keep what is written to it: don't use it"},
		{store.ErrWriterKey, "this needs a full key: see --key-file and --passphrase-file. A writer's key can make backups, list points and `verify --quick`"},
		{store.ErrNotEncrypted, "if it was encrypted once, somebody changed its config or put another repository there: store nothing in it, and find out who. If it was made without encryption, open it without a key; delete its line if a file of known ones is named above"},
		{store.ErrKey, "give the passphrase ($TIDEMARK_PASSPHRASE, --passphrase-file) or a key file (--key-file); `tidemark repo key list` shows which keys there are"},
		{agent.ErrPauseBudget, "give more with --pause-budget, or run it when the guest writes less"},
		{agent.ErrInUse, "name what can pause it with --quiesce qmp=SOCKET, freeze=DIR or pid=PID; or accept a point that shows no single instant with --allow-inconsistent"},
	}
	for _, h := range hints {
		if errors.Is(err, h.err) {
			return clean(err) + "\n  " + h.hint
		}
	}
	return clean(err)
}

// clean shows joined errors in one line each, indented.
func clean(err error) string { return strings.ReplaceAll(err.Error(), "\n", "\n  ") }
