// Package s3test runs a real S3 server for tests: versitygw, which keeps objects as files.
// "make deps" builds it, pinned in tools/s3/go.mod, as bin/versitygw.
package s3test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Program is the environment variable that names another versitygw.
const Program = "TIDEMARK_VERSITYGW"

// Bucket is the bucket that every server has.
const Bucket = "tidemark"

const secret = "tidemark-test" // of a server on the loopback, for the test's time

// Server is an S3 server with one empty bucket, without versions.
type Server struct {
	Endpoint string // "http://127.0.0.1:port"
	Dir      string // where it keeps its objects: Dir/BUCKET/KEY are their files
}

// Find returns the server's program, or an error that says what to do.
func Find() (string, error) {
	if p := os.Getenv(Program); p != "" {
		return exec.LookPath(p)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			if p, err := exec.LookPath(filepath.Join(d, "bin", "versitygw")); err == nil {
				return p, nil
			}
		}
		if d == filepath.Dir(d) {
			break
		}
	}
	p, err := exec.LookPath("versitygw")
	if err != nil {
		return "", errors.New(`no S3 server: build it with "make bin/versitygw"`)
	}
	return p, nil
}

// Start starts a server for the time of the test, or skips the test. It sets the
// environment that clients take credentials from.
func Start(t testing.TB) *Server {
	t.Helper()
	program, err := Find()
	if err != nil {
		t.Skip("SKIP: " + err.Error())
	}
	for name, value := range Env() {
		t.Setenv(name, value)
	}
	s, stop, err := Run(t.Context(), program, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return s
}

// Env is the environment of a client: credentials, and no files of the user's.
func Env() map[string]string {
	return map[string]string{
		"AWS_ACCESS_KEY_ID": secret, "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": "", "AWS_PROFILE": "",
		"AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
		"AWS_EC2_METADATA_DISABLED": "true", "AWS_CA_BUNDLE": "", "AWS_ENDPOINT_URL": "", "AWS_ENDPOINT_URL_S3": "",
	}
}

// Run starts a server that keeps its objects below dir, and waits until it
// answers. stop ends it and waits for its end.
func Run(ctx context.Context, program, dir string) (_ *Server, stop func(), err error) {
	if err := os.MkdirAll(filepath.Join(dir, Bucket), 0o700); err != nil {
		return nil, nil, err
	}
	var last error
	for range 3 { // another process may take the port in between
		s, stop, err := run(ctx, program, dir)
		if err == nil {
			return s, stop, nil
		}
		last = err
	}
	return nil, nil, last
}

func run(ctx context.Context, program, dir string) (*Server, func(), error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		return nil, nil, err
	}
	var log bytes.Buffer
	// Not bound to ctx: a test's context ends before its cleanups, which may need the server.
	cmd := exec.Command(program, "--port", addr, "--access", secret, "--secret", secret, "--quiet", "--keep-alive", "posix", dir)
	cmd.Stdout, cmd.Stderr = &log, &log
	// It must not outlive a test binary that is killed.
	cmd.SysProcAttr = dieWithParent()
	exited := make(chan error, 1)
	started := make(chan error, 1)
	go startAndWait(cmd, started, exited)
	if err := <-started; err != nil {
		return nil, nil, err
	}
	stop := func() {
		_ = cmd.Process.Kill()
		for range exited { // closed when it has ended
		}
	}
	s := &Server{Endpoint: "http://" + addr, Dir: dir}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		select {
		case err := <-exited:
			return nil, nil, fmt.Errorf("%s: %w: %s", program, err, log.String())
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Endpoint+"/", nil)
		if err != nil {
			stop()
			return nil, nil, err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			_ = resp.Body.Close()
			return s, stop, nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			stop()
			return nil, nil, fmt.Errorf("%s does not answer at %s: %s", program, addr, log.String())
		}
	}
}
