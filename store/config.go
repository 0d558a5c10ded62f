package store

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tidemark/tidemark/store/blob"
)

const (
	configName    = "config"
	configFormat  = "tidemark-repo"
	configVersion = 1
	maxConfigLen  = 64 << 10
)

// config is the document at the root of a repository.
type config struct {
	Format     string     `json:"format"`
	Version    int        `json:"version"`
	ID         string     `json:"id"` // 32 hex digits
	Created    time.Time  `json:"created"`
	Hash       string     `json:"hash"`
	Encryption encryption `json:"encryption"`
	// Check is the BLAKE3 hash of the whole document with zeroes in the place of
	// its 64 digits.
	Check string `json:"check"`
}

type encryption struct {
	Mode string `json:"mode"`
}

// Modes of encryption.
const (
	encryptionNone = "none"
	encryptionGCM  = "aes-256-gcm"
)

func (c config) id() (id [16]byte) {
	_, _ = hex.Decode(id[:], []byte(c.ID)) // validated by decodeConfig
	return id
}

func encodeConfig(c config) ([]byte, error) {
	c.Check = strings.Repeat("0", 64)
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode config: %w", err)
	}
	b = append(b, '\n')
	return bytes.Replace(b, []byte(c.Check), []byte(plainHasher.sum(b).String()), 1), nil
}

// decodeConfig tells apart what was never ours, what is newer than this
// program, and what is damaged.
func decodeConfig(b []byte) (config, error) {
	var c config
	if err := json.Unmarshal(b, &c); err != nil || c.Format != configFormat {
		if bytes.Contains(b, []byte(configFormat)) || bytes.Contains(b, []byte(`"check"`)) {
			return c, &CorruptError{configName, "not the document of a repository any more"}
		}
		return c, fmt.Errorf("%w: its object \"config\" is of another program", ErrNotRepository)
	}
	at := bytes.Index(b, []byte(c.Check))
	if len(c.Check) != 64 || at < 0 {
		return c, &CorruptError{configName, "without a check sum"}
	}
	blank := bytes.Clone(b)
	copy(blank[at:], strings.Repeat("0", 64))
	if plainHasher.sum(blank).String() != c.Check {
		return c, &CorruptError{configName, "it does not match its check sum"}
	}
	if c.Version != configVersion {
		return c, fmt.Errorf("config: %w: repository version %d, this program knows %d", ErrVersion, c.Version, configVersion)
	}
	if c.Hash != "blake3" || c.Encryption.Mode != encryptionNone && c.Encryption.Mode != encryptionGCM {
		return c, fmt.Errorf("config: %w: hash %q, encryption %q", ErrVersion, c.Hash, c.Encryption.Mode)
	}
	if id, err := hex.DecodeString(c.ID); err != nil || len(id) != 16 {
		return c, &CorruptError{configName, "bad repository id"}
	}
	return c, nil
}

func readConfig(ctx context.Context, b blob.Store) (config, error) {
	p, err := readSmall(ctx, b, configName, maxConfigLen)
	if errors.Is(err, blob.ErrNotFound) {
		return config{}, fmt.Errorf("%w: it has no object \"config\"", ErrNotRepository)
	}
	if err != nil {
		return config{}, err
	}
	return decodeConfig(p)
}
