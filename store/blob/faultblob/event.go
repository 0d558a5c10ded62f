package faultblob

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Op is what is done at a moment: a method of blob.Store, blob.Locker or blob.TailReader,
// one of the steps of blob.Dir ("step:" and the step's name), or a request ("request:" and its method).
type Op string

// Methods.
const (
	Put      Op = "put"
	Get      Op = "get"
	ReadAt   Op = "read"
	ReadTail Op = "readtail"
	Stat     Op = "stat"
	List     Op = "list"
	ListDirs Op = "listdirs"
	Delete   Op = "delete"
	Lock     Op = "lock"
	Unlock   Op = "unlock"
)

const (
	stepPrefix    = "step:"
	requestPrefix = "request:"
)

// When says which moment of an operation it is. Steps of blob.Dir have but one, Before.
type When string

// Moments.
const (
	Before When = "before"
	Middle When = "middle"
	After  When = "after"
)

// Event is one moment.
type Event struct {
	N    int64 // from 1, over all stores below the Layer
	Op   Op
	When When
	Name string // of the object, the prefix or the lock; of a step, the absolute path; of a request, the URL's path
}

// String implements fmt.Stringer.
func (e Event) String() string { return fmt.Sprintf("%d: %s %s %s", e.N, e.When, e.Op, e.Name) }

// Changing tells whether e belongs to an operation that changes what is stored.
func Changing(e Event) bool {
	switch e.Op {
	case Put, Delete:
		return true
	case Get, ReadAt, ReadTail, Stat, List, ListDirs, Lock, Unlock, requestPrefix + http.MethodGet, requestPrefix + http.MethodHead:
		return false
	}
	return true // steps, other requests
}

// Handler is asked at each moment, by the goroutine that runs the operation, also concurrently. It may
// take its time. An error becomes the operation's: Before, in place of it; Middle, torn; After, in place
// of its success.
type Handler func(context.Context, Event) error

// ErrInjected is wrapped by the errors that handlers of this package make.
var ErrInjected = errors.New("injected fault")

// ErrRepeat is for a Handler to return before an operation: it makes it happen twice, as a network may
// that repeats a request. The first outcome is the operation's. Other operations than
// Put, Delete and Stat ignore it.
var ErrRepeat = errors.New("repeat")
