package vm

import "regexp"

// sign is a text by which a guest shows whether it came up.
type sign struct {
	name string
	re   *regexp.Regexp
}

// signsOfLife are what guests show when they are up. They are looked for in whole
// lines and in a last line without an end.
var signsOfLife = []sign{
	{"login prompt", regexp.MustCompile(`(?m)\blogin: ?$`)},
	{"multi-user target", regexp.MustCompile(`Reached target (multi-user\.target|graphical\.target|.*Multi-User System|.*Graphical Interface)`)},
	{"Tidemark's test guest", regexp.MustCompile(`TIDEMARK-GUEST last \d`)},
}

// signsOfFailure are what firmware, boot loaders and kernels show when nothing comes after.
var signsOfFailure = []sign{
	{"kernel panic", regexp.MustCompile(`Kernel panic - not syncing`)},
	{"no bootable device", regexp.MustCompile(`No bootable device|Operating system not found|Missing operating system|No bootable option or device was found`)},
	{"boot loader's rescue shell", regexp.MustCompile(`(?m)grub rescue>|^grub> ?$`)},
	{"no root file system", regexp.MustCompile(`Unable to mount root fs|ALERT! .* does not exist`)},
	{"emergency shell", regexp.MustCompile(`(?m)You are in emergency mode|Entering emergency mode|Give root password for maintenance|^\(initramfs\) ?$|dracut:/#`)},
	{"UEFI shell", regexp.MustCompile(`(?m)^Shell> ?$`)},
	{"Windows' boot manager is missing", regexp.MustCompile(`BOOTMGR is missing|NTLDR is missing`)},
}

// escapes are terminal control sequences (ECMA-48 CSI, OSC, and two-character ones) and
// the other controls that don't end a line.
var escapes = regexp.MustCompile("\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)|\x1b[@-Z\\\\^_a-z]|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]")
