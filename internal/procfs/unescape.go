package procfs

import (
	"strconv"
	"strings"
)

// Unescape undoes the octal escapes of paths in files such as mountinfo and swaps (mangle_path in
// fs/seq_file.c). What is no escape stays as it is.
func Unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
