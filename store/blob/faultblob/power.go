package faultblob

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/tidemark/tidemark/store/blob"
)

// Loss says what a power failure takes, when a child is killed or has come to its end: changes
// of a folder's entries that it was not synced after. A file system may keep any of them.
type Loss string

// Losses.
const (
	LoseNothing Loss = ""        // the process is killed, and the kernel lives on
	LoseAll     Loss = "all"     // that is not synced
	LoseLinks   Loss = "links"   // names that are new; what was deleted stays so
	LoseUnlinks Loss = "unlinks" // deletions: what is new stays
)

// Losses lists them all.
func Losses() []Loss { return []Loss{LoseNothing, LoseAll, LoseLinks, LoseUnlinks} }

// Lose says what a power failure takes of the Dirs that are watched. Before the first Watch.
// The content of files is not lost: that it is synced before it gets a name is seen by the order
// of the steps (blob's tests).
func (l *Layer) Lose(what Loss) {
	if what != LoseNothing {
		l.power = &power{loss: what}
	}
}

// power keeps book of what a Dir has changed and not synced.
type power struct {
	loss Loss

	mu      sync.Mutex
	stashed int
	changes []change
}

// change is an entry of a folder that is new or gone.
type change struct {
	path string
	kept string // where the file is that was deleted; empty: it is new
}

// step is called before each step.
func (p *power) step(root string, s blob.Step) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch s.Op {
	case blob.StepMkdir, blob.StepLink, blob.StepRename:
		if _, err := os.Lstat(s.Path); os.IsNotExist(err) {
			p.changes = append(p.changes, change{path: s.Path})
		}
	case blob.StepUnlink:
		kept := filepath.Join(root, fmt.Sprintf(".deleted-%d-%d", os.Getpid(), p.stashed))
		p.stashed++
		if err := os.Link(s.Path, kept); err != nil {
			if os.IsNotExist(err) {
				return nil
			}
			return err
		}
		p.changes = append(p.changes, change{s.Path, kept})
	case blob.StepSyncDir:
		p.changes = slices.DeleteFunc(p.changes, func(c change) bool { return filepath.Dir(c.path) == s.Path })
	}
	return nil
}

// fail takes back what was not synced, the last first. No step is taken any more.
func (p *power) fail() {
	if p == nil {
		return
	}
	p.mu.Lock() // for good
	for _, c := range slices.Backward(p.changes) {
		switch {
		case c.kept == "" && p.loss != LoseUnlinks:
			_ = os.RemoveAll(c.path) // a folder with what is in it
		case c.kept != "" && p.loss != LoseLinks:
			_ = os.Link(c.kept, c.path)
		}
	}
}
