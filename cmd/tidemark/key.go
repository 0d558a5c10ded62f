package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/term"

	"github.com/tidemark/tidemark/store"
)

// passphraseEnv holds the passphrase where no file and no terminal does. Only root and the user can read a
// process's environment.
const passphraseEnv = "TIDEMARK_PASSPHRASE"

// openAt opens the repository at where. If it is encrypted, its key is what is given first of --key-file,
// --passphrase-file and their variables, or asked for on the terminal.
func (g *globals) openAt(ctx context.Context, where string) (*store.Repo, error) {
	key, err := g.key()
	if err != nil {
		return nil, err
	}
	if key == nil {
		return g.openAsking(ctx, where, "passphrase of the repository: ")
	}
	return store.Open(ctx, where, store.WithKey(key))
}

// openAsking asks for the passphrase of an encrypted repository, and remembers that it is encrypted.
func (g *globals) openAsking(ctx context.Context, where, prompt string) (*store.Repo, error) {
	known, err := isKnownEncrypted(where)
	if err != nil {
		return nil, fmt.Errorf("which repositories are encrypted: %w", err)
	}
	opts := []store.Option{store.AskKey(func(context.Context) (store.Key, error) {
		p, err := ask(prompt)
		return store.Passphrase(p), err
	})}
	if known || g.encrypted {
		opts = append(opts, store.MustBeEncrypted())
	}
	r, err := store.Open(ctx, where, opts...)
	if known && errors.Is(err, store.ErrNotEncrypted) {
		name, _ := knownEncrypted()
		err = fmt.Errorf("%w: its passphrase was typed here before, as %s has it", err, name)
	}
	if err == nil && r.Encrypted() {
		remember(where)
	}
	return r, err
}

// remember notes that a repository is encrypted. It goes without, too.
func remember(where string) {
	if err := rememberEncrypted(where); err != nil {
		fmt.Fprintf(os.Stderr, "tidemark: WARNING: if this repository says one day that it is not encrypted, this host will not notice without --encrypted: %v\n", err)
	}
}

// key is the key that was given, or nil.
func (g *globals) key() (store.Key, error) {
	switch {
	case g.keyFile != "" && g.passphraseFile != "":
		return nil, usageError{errors.New("give either --key-file or --passphrase-file")}
	case g.keyFile != "":
		return readKeyFile(g.keyFile)
	case g.passphraseFile != "":
		return readPassphrase(g.passphraseFile)
	}
	if p := os.Getenv(passphraseEnv); p != "" {
		return store.Passphrase(p), nil
	}
	if f := os.Getenv("TIDEMARK_PASSPHRASE_FILE"); f != "" {
		return readPassphrase(f)
	}
	if f := os.Getenv("TIDEMARK_KEY_FILE"); f != "" {
		return readKeyFile(f)
	}
	return nil, nil //nolint:nilnil // none was given
}

func readKeyFile(name string) (*store.KeyFile, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	k, err := store.ParseKeyFile(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return k, nil
}

// readPassphrase reads the first line of a file.
func readPassphrase(name string) (store.Passphrase, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("passphrase file: %w", err)
	}
	b, _, _ = bytes.Cut(b, []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	if len(b) == 0 {
		return nil, usageError{fmt.Errorf("%s: its first line is empty", name)}
	}
	return b, nil
}

// ask reads a secret from the terminal.
func ask(prompt string) ([]byte, error) {
	in := int(os.Stdin.Fd())
	if !term.IsTerminal(in) {
		return nil, fmt.Errorf("%w was given, and there is no terminal to ask for one", store.ErrKey)
	}
	fmt.Fprint(os.Stderr, prompt)
	p, err := term.ReadPassword(in)
	fmt.Fprintln(os.Stderr)
	if err == nil && len(p) == 0 {
		err = fmt.Errorf("%w: an empty passphrase", store.ErrKey)
	}
	return p, err
}

// askTwice reads a new secret.
func askTwice(prompt string) ([]byte, error) {
	p, err := ask(prompt)
	if err != nil {
		return nil, err
	}
	again, err := ask("once more: ")
	if err == nil && !bytes.Equal(p, again) {
		err = usageError{errors.New("the two passphrases differ")}
	}
	return p, err
}

// writeNew creates a file that only its owner can read, by what fill returns. It makes sure that the file can be
// created before fill is called, and leaves none if that fails.
func writeNew(name string, fill func() ([]byte, error)) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(name))
		}
	}()
	b, err := fill()
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}
