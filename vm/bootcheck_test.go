package vm

import (
	"bytes"
	"strings"
	"testing"
	"unicode"
)

func TestConsolesAreJudged(t *testing.T) {
	for _, c := range []struct {
		name, console string
		want          Verdict
	}{
		{"login prompt", "Debian GNU/Linux 12 web1 ttyS0\r\n\r\nweb1 login: ", Booted},
		{"a word about logins", "systemd-logind: new login: none\r\nmore", ""},
		{"systemd", "[  \x1b[0;32mOK\x1b[0m  ] Reached target \x1b[0;1;39mmulti-user.target\x1b[0m - Multi-User System.\r\n", Booted},
		{"the kernel's panic", "[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n", BootFailed},
		{"panic after a prompt", "web1 login: \r\n[ 9.0] Kernel panic - not syncing: Fatal exception\r\n", BootFailed},
		{"SeaBIOS", "SeaBIOS (version 1.16.2)\r\nBooting from Hard Disk...\r\nBoot failed: not a bootable disk\r\n\r\nNo bootable device.\r\n", BootFailed},
		{"SeaBIOS goes on", "Booting from Hard Disk...\r\nBoot failed: not a bootable disk\r\n", ""},
		{"GRUB's rescue shell", "error: no such partition.\r\nEntering rescue mode...\r\n\x1b[0mgrub rescue> ", BootFailed},
		{"GRUB's shell", "GNU GRUB\r\n\r\ngrub> ", BootFailed},
		{"GRUB's menu", "*Debian GNU/Linux\r\nPress c for a grub> prompt here\r\n", ""},
		{"initramfs", "ALERT! UUID=12 does not exist. Dropping to a shell!\r\n(initramfs) ", BootFailed},
		{"systemd's emergency", "You are in emergency mode. After logging in, type journalctl\r\n", BootFailed},
		{"UEFI shell", "UEFI Interactive Shell v2.2\r\n\x1b[1mShell> ", BootFailed},
		{"nothing yet", "Loading Linux 6.1.0 ...\r\n", ""},
	} {
		w := NewBootWatch()
		for _, b := range []byte(c.console) { // as a slow line would bring it
			if _, err := w.Write([]byte{b}); err != nil {
				t.Fatal(err)
			}
		}
		got := judge(w.Text(), signsOfLife, &happened{})
		if got.Verdict != c.want || (got.Verdict != "") != (got.Line != "") {
			t.Errorf("%s: %q by %q (%s), want %q", c.name, got.Verdict, got.Line, got.Reason, c.want)
		}
	}
}

// The line that decides is shown on the operator's terminal.
func TestTheGuestsLineIsPrintable(t *testing.T) {
	for _, console := range []string{
		"\x1b\x1b[m[2J login: ",
		"\x1b\x1b[m]52;c;cHduZWQ=login: ",
		"\xc2\x1b[m\x9b2J login: ",
		"\u202elogin: ",
	} {
		w := NewBootWatch()
		_, _ = w.Write([]byte(console))
		got := judge(w.Text(), signsOfLife, &happened{})
		if got.Verdict != Booted || strings.ContainsFunc(got.Line, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q: %q by %q", console, got.Verdict, got.Line)
		}
	}
}

func TestWhatAMachineDidIsJudged(t *testing.T) {
	for _, c := range []struct {
		what *happened
		want Verdict
	}{
		{&happened{}, ""},
		{&happened{panicked: true}, BootFailed},
		{&happened{shutdown: true}, BootFailed},
		{&happened{resets: maxResets}, ""},
		{&happened{resets: maxResets + 1}, BootFailed},
	} {
		if got := judge(nil, signsOfLife, c.what); got.Verdict != c.want {
			t.Errorf("resets %d: %q, want %q", c.what.resets, got.Verdict, c.want)
		}
	}
}

// What a guest prints is bounded, and means the same however it is cut.
func FuzzBootWatch(f *testing.F) {
	f.Add([]byte("\x1b[0;32mOK\x1b[0m login: "), 4)
	f.Add([]byte("\x1b]0;title\x07\x1b[\x1b\x1bx\r\n"), 2)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		whole, parts := NewBootWatch(), NewBootWatch()
		_, _ = whole.Write(b)
		cut = max(0, min(cut, len(b)))
		_, _ = parts.Write(b[:cut])
		_, _ = parts.Write(b[cut:])
		if n := len(whole.Text()); n > MaxConsole {
			t.Errorf("%d bytes are kept", n)
		}
		judge(whole.Text(), signsOfLife, &happened{})
		if len(b) < 60 && bytes.Count(b, []byte{0x1b}) == 1 && !bytes.Contains(b, []byte{'\r'}) && !bytes.Equal(whole.Text(), parts.Text()) {
			t.Errorf("%q cut at %d: %q and %q", b, cut, whole.Text(), parts.Text())
		}
	})
}
