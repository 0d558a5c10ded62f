package nbd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The files of a folder of certificates, as QEMU's tls-creds-x509, libnbd and
// nbdkit name them.
const (
	caFile   = "ca-cert.pem"
	crlFile  = "ca-crl.pem" // may be missing
	certFile = "server-cert.pem"
	keyFile  = "server-key.pem"
	pskFile  = "keys.psk" // what QEMU's tls-creds-psk has instead
)

// ErrCertificates is wrapped when a folder of certificates cannot be used.
var ErrCertificates = errors.New("TLS certificates")

// Certificates are those in a folder, for [TLS.Config]. Files that have changed
// are read again at the next handshake. Many goroutines may use them.
type Certificates struct {
	dir    string
	verify bool
	log    *slog.Logger

	mu      sync.Mutex
	version string // of the files that were looked at last
	current *tls.Config
}

// LoadCertificates reads the folder's ca-cert.pem, server-cert.pem and
// server-key.pem, and ca-crl.pem if there is one. With verify, a client has to
// show a certificate that one of ca-cert.pem has signed; without, it may, and
// ca-cert.pem may be missing. What is wrong with the files later, when they have
// changed, goes to log, and what was read before stays in force. Errors wrap
// [ErrCertificates].
func LoadCertificates(dir string, verify bool, log *slog.Logger) (*Certificates, error) {
	c := &Certificates{dir: dir, verify: verify, log: log}
	c.version = c.look()
	var err error
	if c.current, err = c.load(time.Now()); err != nil {
		return nil, fmt.Errorf("%w in %s: %w", ErrCertificates, dir, err)
	}
	return c, nil
}

// Config is the configuration that the files say now.
func (c *Certificates) Config() (*tls.Config, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if version := c.look(); version != c.version {
		c.version = version
		if config, err := c.load(time.Now()); err != nil {
			// Half of a renewal, perhaps: the other half changes the version again.
			c.log.Warn("nbd: changed TLS certificates are not used, the ones before stay", "dir", c.dir, "error", err)
		} else {
			c.current = config
			c.log.Info("nbd: TLS certificates have changed", "dir", c.dir)
		}
	}
	return c.current, nil
}

// look tells one state of the files from another.
func (c *Certificates) look() string {
	var b strings.Builder
	for _, name := range []string{caFile, crlFile, certFile, keyFile} {
		st, err := os.Stat(filepath.Join(c.dir, name))
		if err != nil {
			fmt.Fprintf(&b, "%v;", err)
			continue
		}
		sys, _ := st.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%d:%d:%d:%d;", sys.Dev, sys.Ino, st.Size(), sys.Ctim.Nano())
	}
	return b.String()
}

func (c *Certificates) load(now time.Time) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(c.dir, certFile), filepath.Join(c.dir, keyFile))
	if err != nil {
		if _, pskErr := os.Stat(filepath.Join(c.dir, pskFile)); pskErr == nil && errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("pre-shared keys (%s) are not supported, only X.509 certificates: %w", pskFile, err)
		}
		return nil, err
	}
	if leaf := pair.Leaf; now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return nil, fmt.Errorf("%s is valid from %s to %s, and it is %s", certFile,
			leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.VerifyClientCertIfGiven,
		// Every client shows its certificate again, so that one that was revoked
		// or whose authority was removed gets no further connection.
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // replies are large, and waited for as a whole
	}
	authorities, err := readCertificates(filepath.Join(c.dir, caFile))
	switch {
	case errors.Is(err, fs.ErrNotExist) && !c.verify:
		config.ClientAuth = tls.NoClientCert
		return config, nil
	case err != nil:
		return nil, err
	case c.verify:
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	config.ClientCAs = x509.NewCertPool()
	for _, a := range authorities {
		config.ClientCAs.AddCert(a)
	}
	lists, err := readRevocations(filepath.Join(c.dir, crlFile), authorities)
	if err != nil {
		return nil, err
	}
	config.VerifyConnection = func(s tls.ConnectionState) error { return lists.check(s.VerifiedChains, time.Now()) }
	return config, nil
}

// blocks are the PEM blocks of one kind in a file, at least one.
func blocks(file, kind string) ([][]byte, error) {
	rest, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var list [][]byte
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type == kind {
			list = append(list, b.Bytes)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s has no PEM block %q", file, kind)
	}
	return list, nil
}

func readCertificates(file string) ([]*x509.Certificate, error) {
	list, err := blocks(file, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	certs := make([]*x509.Certificate, len(list))
	for i, b := range list {
		if certs[i], err = x509.ParseCertificate(b); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	return certs, nil
}

// revocations are lists of certificates that are no longer valid.
type revocations []*x509.RevocationList

// readRevocations reads lists that one of the authorities must have signed. A
// file that is not there is an empty one.
func readRevocations(file string, authorities []*x509.Certificate) (revocations, error) {
	list, err := blocks(file, "X509 CRL")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all := make(revocations, len(list))
	for i, b := range list {
		if all[i], err = x509.ParseRevocationList(b); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		err := fmt.Errorf("no authority of %s has this name", caFile)
		for _, a := range authorities {
			if bytes.Equal(a.RawSubject, all[i].RawIssuer) {
				if err = all[i].CheckSignatureFrom(a); err == nil {
					break
				}
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%s: list of %s: %w", file, all[i].Issuer, err)
		}
	}
	return all, nil
}

// check refuses a client unless one of its chains has no revoked certificate. A
// list that is out of date says nothing about today, so nobody passes.
func (r revocations) check(chains [][]*x509.Certificate, now time.Time) error {
	var err error
	for _, chain := range chains {
		if err = r.checkChain(chain, now); err == nil {
			return nil
		}
	}
	return err
}

func (r revocations) checkChain(chain []*x509.Certificate, now time.Time) error {
	for _, cert := range chain {
		for _, l := range r {
			if !bytes.Equal(l.RawIssuer, cert.RawIssuer) {
				continue
			}
			if !l.NextUpdate.IsZero() && now.After(l.NextUpdate) {
				return fmt.Errorf("list of revoked certificates of %s is out of date since %s", l.Issuer, l.NextUpdate.Format(time.RFC3339))
			}
			for _, e := range l.RevokedCertificateEntries {
				if e.SerialNumber.Cmp(cert.SerialNumber) == 0 {
					return fmt.Errorf("certificate of %s was revoked at %s", cert.Subject, e.RevocationTime.Format(time.RFC3339))
				}
			}
		}
	}
	return nil
}
