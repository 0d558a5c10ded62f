package nbd

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
)

// secretive is a set of exports of which a client sees those that it may.
type secretive struct {
	*Static
	may  func(c Client, name string) bool
	seen chan Client
}

func (s secretive) Open(ctx context.Context, c Client, name string) (Export, error) {
	s.seen <- c
	if !s.may(c, name) {
		return Export{}, fmt.Errorf("%w %q", ErrUnknownExport, name)
	}
	return s.Static.Open(ctx, c, name)
}

func (s secretive) List(ctx context.Context, c Client) ([]Listing, error) {
	s.seen <- c
	list, err := s.Static.List(ctx, c)
	return slices.DeleteFunc(list, func(l Listing) bool { return !s.may(c, l.Name) }), err
}

func TestExportsLearnWhoTheClientIs(t *testing.T) {
	from := secretive{
		Static: static(t, Export{Name: "a", Disk: newMemDisk(1)}, Export{Name: "b", Disk: newMemDisk(2)}),
		may:    func(c Client, name string) bool { return name == "b" || c.Network == "unix" },
		seen:   make(chan Client, 16),
	}
	s := &Server{Exports: from}
	socket, _ := start(t, s)
	l, err := Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	startListener(t, s, l)

	p := dial(t, "unix", socket)
	p.hello(3)
	if n := len(p.option(optList)); n != 3 {
		t.Errorf("unix: %d replies to LIST", n)
	}
	c := <-from.seen
	if c.Network != "unix" || c.Address != "" || c.Unix == nil || *c.Unix != (Credentials{uint32(os.Getuid()), uint32(os.Getgid()), int32(os.Getpid())}) || c.TLS || c.Certificate != nil {
		t.Errorf("unix: %+v", c)
	}

	p = dial(t, "tcp", l.Addr().String())
	p.hello(3)
	if n := len(p.option(optList)); n != 2 {
		t.Errorf("tcp: %d replies to LIST", n)
	}
	c = <-from.seen
	if c.Network != "tcp" || c.Address != p.LocalAddr().String() || c.Unix != nil {
		t.Errorf("tcp: %+v", c)
	}
	hidden, missing := p.option(optInfo, goData("a")), p.option(optInfo, goData("c"))
	if fmt.Sprint(hidden) != fmt.Sprint(missing) || last(hidden) != repErrUnknown {
		t.Errorf("%v for a hidden export, %v for a missing one", hidden, missing)
	}
	if got := p.option(optGo, goData("", infoName)); last(got) != repAck || !strings.HasSuffix(string(got[2].data), "b") {
		t.Errorf("the only one that can be seen is not the default: %v", got)
	}
}

func TestClientThatIsGoneIsNobody(t *testing.T) {
	socket, _ := start(t, twoExports(t))
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if got := clientOf(c); got.Unix != nil {
		t.Errorf("%+v", got)
	}
}
