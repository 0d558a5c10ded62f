package blob

import "io"

// Step is a system call by which a Dir is about to change what is stored.
type Step struct {
	Op   string // one of the Step constants
	Path string // absolute; of a file without a name, that of its folder
}

// Steps. Put: mkdir and syncdir for each new folder, create, write (per 256 KiB),
// sync, link, syncdir. Delete: unlink, syncdir. Rename takes link's place where there
// are no hard links. Unlink also tidies after a failed Put.
const (
	StepMkdir   = "mkdir"
	StepCreate  = "create"
	StepWrite   = "write"
	StepSync    = "sync"
	StepLink    = "link"
	StepRename  = "rename"
	StepUnlink  = "unlink"
	StepSyncDir = "syncdir"
)

// Watch has f called before each Step, by the goroutine that takes it. An error of f is
// the step's, which then is not taken. It is there for tests of what crashes and
// failing disks leave behind, and must be called before any other method.
func (d *Dir) Watch(f func(Step) error) { d.watch = f }

func (d *Dir) step(op, path string) error {
	if d.watch == nil {
		return nil
	}
	return d.watch(Step{op, path})
}

// steppedWriter takes a step before each Write. It hides the file's ReadFrom,
// which would copy all at once, deaf to contexts.
type steppedWriter struct {
	d    *Dir
	path string
	w    io.Writer
}

func (s steppedWriter) Write(p []byte) (int, error) {
	if err := s.d.step(StepWrite, s.path); err != nil {
		return 0, err
	}
	return s.w.Write(p)
}
