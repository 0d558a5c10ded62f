package nbd

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"testing"
)

func TestRules(t *testing.T) {
	ca := newAuthority(t, "ca")
	standby := ca.issue("standby1", manyNames).Leaf
	tricky := ca.issue("x:web1@*", func(c *x509.Certificate) { c.DNSNames = []string{"*"} }).Leaf
	me := &Credentials{UID: 1000, GID: 100}
	for _, c := range []struct {
		rule   string
		client Client
		export string
		want   bool
	}{
		{"*:*", Client{}, "", true},
		{"*:*", Client{}, "web1@latest/disk0", true},
		{"*:web1@*", Client{}, "web1@latest/disk0", true},
		{"*:web1@*", Client{}, "web10@latest/disk0", false},
		{"*:web1@*", Client{}, "", false},
		{"*:*/disk0", Client{}, "web1@latest/disk0", true},
		{"*:*/disk0", Client{}, "web1@latest/disk01", false},
		{"*:w*1*k0", Client{}, "web1@latest/disk0", true},
		{"*:web", Client{}, "web1", false},
		{"CN=standby1:web*", Client{Certificate: standby}, "web", true},
		{"CN=standby1:web*", Client{}, "web", false},
		{"CN=standby1:web*", Client{TLS: true}, "web", false},
		{"CN=standby:web*", Client{Certificate: standby}, "web", false},
		{"cn=standby*:web*", Client{Certificate: standby}, "web", true},
		{"CN=STANDBY1:web*", Client{Certificate: standby}, "web", false},
		{"DNS=standby1:web*", Client{Certificate: standby}, "web", false},
		{"DNS=b.EXAMPLE.org:web*", Client{Certificate: standby}, "web", true},
		{"DNS=*.example.org:web*", Client{Certificate: standby}, "web", true},
		{"DNS=*.example.com:web*", Client{Certificate: standby}, "web", false},
		{"IP=127.0.0.1:web*", Client{Certificate: standby}, "web", true},
		{"EMAIL=me@example.org:web*", Client{Certificate: standby}, "web", true},
		{"URI=spiffe://example.org/standby:web*", Client{Certificate: standby}, "web", true},
		{"URI=spiffe://example.org/other:web*", Client{Certificate: standby}, "web", false},
		{"CN=web1:*", Client{Certificate: tricky}, "web", false},
		{"DNS=a.example.org:*", Client{Certificate: tricky}, "web", false}, // the certificate has no patterns
		{"UID=1000:*", Client{Unix: me}, "web", true},
		{"UID=100:*", Client{Unix: me}, "web", false},
		{"UID=0:*", Client{}, "web", false},
		{"gid=100:*", Client{Unix: me}, "web", true},
		{"GID=1000:*", Client{Unix: me}, "web", false},
		{"UID=root:*", Client{Unix: &Credentials{}}, "web", true},
		{"GID=root:*", Client{Unix: &Credentials{}}, "web", true},
	} {
		r, err := ParseRule(c.rule)
		if err != nil {
			t.Errorf("%s: %v", c.rule, err)
		} else if got := r.allows(c.client, c.export); got != c.want {
			t.Errorf("%s lets %v see %q: %v", c.rule, c.client, c.export, got)
		}
	}
}

func TestRulesThatMakeNoSense(t *testing.T) {
	for _, rule := range []string{"", ":", "*", "*:", "standby1:web1", "CN=:web1", "CN:web1", "OU=x:web1", "=x:web1", "UID=-1:x", "UID=nobody-of-this-name:x", "GID=4294967296:x", "UID=*:x"} {
		if _, err := ParseRule(rule); !errors.Is(err, ErrRule) {
			t.Errorf("%q: %v", rule, err)
		}
	}
}

func FuzzParseRule(f *testing.F) {
	f.Add("CN=a:b*", "a", "b")
	f.Add("*:*x*y*", "", "xxyy")
	f.Fuzz(func(t *testing.T, rule, who, export string) {
		r, err := ParseRule(rule)
		if err != nil {
			return
		}
		r.allows(Client{Certificate: &x509.Certificate{DNSNames: []string{who}}}, export)
		if !match(export, export) && !strings.Contains(export, "*") || !match("*"+export[len(export)/2:], export) && !strings.Contains(export, "*") {
			t.Errorf("%q does not match itself", export)
		}
	})
}

// What a client may not see answers just as what is not there, whatever is asked.
func TestForbiddenExportsAreAsIfNotThere(t *testing.T) {
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	mine, err := ParseRule("UID=" + u.Username + ":b*")
	if err != nil {
		t.Fatal(err)
	}
	other, err := ParseRule("UID=" + strconv.Itoa(os.Getuid()+1) + ":*")
	if err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t, "ca")
	with, _ := ca.serverTLS(false, false)
	for _, tls := range []*TLS{nil, with} {
		all := &countingExports{Static: static(t, Export{Name: "a", Disk: newMemDisk(4096)}, Export{Name: "b", Disk: newMemDisk(4096)})}
		socket, _ := start(t, &Server{Exports: Restrict(all, other, mine), TLS: tls})
		p := dial(t, "unix", socket)
		p.hello(3)
		p.option(optStructuredReply)
		if list := p.option(optList); len(list) != 2 || string(list[0].data[4:]) != "b" {
			t.Errorf("%v", list)
		}
		for _, option := range []uint32{optInfo, optGo, optSetMetaContext, optListMetaContext} {
			ask := func(name string) string {
				if option == optInfo || option == optGo {
					return fmt.Sprint(p.option(option, goData(name, infoName)))
				}
				return fmt.Sprint(p.option(option, uint32(len(name)), name, uint32(1), uint32(15), "base:allocation"))
			}
			if a, c := ask("a"), ask("c"); a != c {
				t.Errorf("option %d: %s for what is forbidden, %s for what is not there", option, a, c)
			}
		}
		for _, name := range []string{"a", "c"} {
			q := dial(t, "unix", socket)
			q.hello(3)
			q.putOption(optExportName, name)
			q.wantClosed()
		}
		if n := all.opened.Load(); n != 0 {
			t.Errorf("%d times a forbidden export was opened", n)
		}
		if got := p.option(optGo, goData("", infoName)); last(got) != repAck || string(got[2].data[2:]) != "b" {
			t.Errorf("the default export is %v", got)
		}
	}
}
