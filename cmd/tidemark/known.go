package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// knownEncrypted is the file with the locations of repositories whose passphrase was typed, one quoted in a line.
// Where a passphrase is asked for, only a repository that says that it is encrypted has it asked for: so one
// that was encrypted once and says that it is not must be noticed.
func knownEncrypted() (string, error) {
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(dir, "tidemark", "encrypted-repositories"), nil
}

// knownAs is the one spelling of a location. Other ways to the same folder or bucket are other locations.
func knownAs(where string) (string, error) {
	if s, _, _ := strings.Cut(where, "?"); strings.HasPrefix(s, "s3:") {
		return strings.TrimSuffix(s, "/"), nil
	}
	return filepath.Abs(strings.TrimPrefix(where, "dir:"))
}

// isKnownEncrypted tells whether where was remembered.
func isKnownEncrypted(where string) (bool, error) {
	name, err := knownEncrypted()
	if err != nil {
		return false, nil // no home: nothing was remembered
	}
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	as, err := knownAs(where)
	if err != nil {
		return false, err
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if lines.Text() == strconv.Quote(as) {
			return true, nil
		}
	}
	return false, lines.Err()
}

// rememberEncrypted notes that the repository at where is encrypted. It is durable when it returns.
func rememberEncrypted(where string) (err error) {
	if known, err := isKnownEncrypted(where); known || err != nil {
		return err
	}
	name, err := knownEncrypted()
	if err != nil {
		return err
	}
	as, err := knownAs(where)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// In a line of its own, also if somebody was killed while writing the one before.
	if _, err := fmt.Fprintf(f, "\n%q\n", as); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close()) // the file may be new
}
