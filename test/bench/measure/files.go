package measure

import (
	"io/fs"
	"math/rand/v2"
	"path/filepath"
)

// File is a regular file below a directory.
type File struct {
	Path string // relative
	Size int64  // bytes
}

// FilesBelow lists the regular files below a directory.
func FilesBelow(dir string) ([]File, error) {
	var all []File
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		all = append(all, File{rel, info.Size()})
		return err
	})
	return all, err
}

// ChooseFiles takes at random what fits into budget, in bytes, of a new ext4 file system; it reorders all. A file costs whole blocks, and some for its names; what
// ext4 has inodes for is one per 16 KiB.
func ChooseFiles(all []File, budget int64, seed uint64) []File {
	rnd := rand.New(rand.NewPCG(seed, 0))
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	var out []File
	var used int64
	for inodes := budget / (16 << 10); inodes > 0 && len(all) > 0; all = all[1:] {
		if cost := (all[0].Size+4095)&^4095 + 512; used+cost <= budget {
			used += cost
			inodes--
			out = append(out, all[0])
		}
	}
	return out
}
