package store

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestAllOnEncryptedRepositories runs every other test of the package again, on encrypted
// repositories.
func TestAllOnEncryptedRepositories(t *testing.T) {
	if testEncrypted {
		t.Skip("this is that run")
	}
	if testing.Short() {
		t.Skip("takes as long as all other tests")
	}
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.timeout=20m")
	cmd.Env = append(os.Environ(), encryptedEnv+"=1")
	out, err := cmd.CombinedOutput()
	passed := 0
	var failures []string
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		switch line := strings.TrimSpace(lines.Text()); {
		case strings.HasPrefix(line, "--- PASS"):
			passed++
		case strings.HasPrefix(line, "=== "), strings.HasPrefix(line, "--- SKIP"):
		default:
			failures = append(failures, lines.Text())
		}
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(failures, "\n"))
	}
	if passed < 50 {
		t.Errorf("only %d tests ran", passed)
	}
	t.Logf("%d tests passed", passed)
}

// TestModeOfTestRepositories keeps the run above from testing what is not encrypted.
func TestModeOfTestRepositories(t *testing.T) {
	r := testRepo(t)
	if r.Encrypted() != testEncrypted {
		t.Errorf("encrypted: %v, want %v", r.Encrypted(), testEncrypted)
	}
	if n := len(objectsBelow(t, r, "keys/")); (n == 1) != testEncrypted {
		t.Errorf("%d documents of keys", n)
	}
}

func objectsBelow(t testing.TB, r *Repo, prefix string) (names []string) {
	t.Helper()
	for _, n := range objects(t, r) {
		if strings.HasPrefix(n, prefix) {
			names = append(names, n)
		}
	}
	return names
}
