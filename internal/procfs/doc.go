// Package procfs reads what the kernel writes into the text files of /proc.
//
// It hides how names are escaped there (proc(5)). Its functions keep no state. It may import no
// other package of Tidemark.
package procfs
