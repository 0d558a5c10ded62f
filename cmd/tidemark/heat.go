package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tidemark/tidemark/bpf"
)

// deviceHeat is what heat tells of one device.
type deviceHeat struct {
	Device   string   `json:"device"`
	Size     int64    `json:"size"`
	Since    string   `json:"since"`
	Writes   uint64   `json:"writes"`
	Written  uint64   `json:"written_bytes"`
	Discards uint64   `json:"discarded_bytes"`
	Rewrites uint64   `json:"rewritten_bytes"`
	Region   int64    `json:"region_bytes"`
	Heat     []uint64 `json:"region_written_bytes"`
	Unknown  []string `json:"unknown,omitempty"` // why the next backup compares, such as an audit's alarm
}

func newHeat(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "heat NAME|DEV|FILE...",
		Short: "Draw where a VM writes",
		Long: `Draw where the disks of a VM, or tracked devices and image files, were written since tracking began:
the disk from its beginning to its end, darker where more was written. The picture is cheap and a
little less than the truth; it says nothing of what changed (see status and points for that).
Where it is unknown what changed, as after an audit's alarm, that stands below the picture.

What has a slash in it is a path. Another name is looked up in the repository (the disks of its last
point), or is a file here if no repository is given.`,
		Example: `  tidemark heat /dev/vg0/web1
  tidemark heat ./web1.raw
  tidemark heat web1 -r /srv/backup
  tidemark heat /dev/loop0 --json | jq '.[0].region_written_bytes'`,
		Args: args(1, -1),
		RunE: func(c *cobra.Command, names []string) (err error) {
			devs, err := g.devices(c, names)
			if err != nil {
				return err
			}
			tr, err := bpf.Open(bpf.Options{Dir: g.pins, AdoptOnly: true})
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, tr.Close()) }()
			all, unread := tr.Status()
			rows := make([]deviceHeat, 0, len(devs))
			for _, path := range devs {
				row, err := heatOf(all, path)
				if err != nil {
					return errors.Join(err, unread)
				}
				rows = append(rows, row)
			}
			if g.json {
				return printJSON(c.OutOrStdout(), rows)
			}
			for _, r := range rows {
				if err := r.draw(c.OutOrStdout(), columns(c.OutOrStdout())); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// devices turns names of VMs into the disks of their last points.
func (g *globals) devices(c *cobra.Command, names []string) (devs []string, err error) {
	for _, name := range names {
		if strings.Contains(name, "/") || g.repo == "" && isFile(name) {
			devs = append(devs, name)
			continue
		}
		repo, err := g.open(c.Context())
		if err != nil {
			return nil, err
		}
		p, err := repo.Find(c.Context(), name)
		if err = errors.Join(err, repo.Close()); err != nil {
			return nil, err
		}
		for _, d := range p.Disks {
			devs = append(devs, d.Source)
		}
	}
	return devs, nil
}

func heatOf(all []bpf.Status, path string) (deviceHeat, error) {
	what, err := bpf.LookupTarget(path)
	if err != nil {
		return deviceHeat{}, err
	}
	for _, s := range all {
		if s.Is(what) {
			return deviceHeat{
				Device: path, Size: s.Size, Since: clock(s.Since), Writes: s.Counts.Submits, Written: s.Counts.SubmitSectors * 512,
				Discards: s.Counts.DiscardSectors * 512, Rewrites: s.Counts.RewriteSectors * 512, Region: s.Heat.Region, Heat: s.Heat.Bytes,
				Unknown: append(s.Taint.Reasons(), s.Loss.Reasons()...),
			}, nil
		}
	}
	return deviceHeat{}, fmt.Errorf("%s: %w", path, bpf.ErrNotRegistered)
}

// columns is the width of a terminal, or 80.
func columns(w io.Writer) int {
	if f, ok := w.(*os.File); ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 20 {
			return min(n, 200)
		}
	}
	return 80
}

// shades go from nothing written to the most, each four times the one before.
var shades = []rune(" .:-=+*#%@")

const heatRows = 8

// draw prints the disk as rows of cells of equal size, each shaded by the bytes written to it.
func (h deviceHeat) draw(w io.Writer, width int) error {
	cols := width - 14
	cells := squeeze(h.Heat, cols*heatRows)
	cell := int64(1)
	if len(cells) > 0 {
		cell = (h.Size + int64(len(cells)) - 1) / int64(len(cells))
	}
	var most uint64
	for _, n := range cells {
		most = max(most, n)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %s, since %s: %d writes, %s written, %s discarded, %s rewritten\n", h.Device, size(h.Size), h.Since, h.Writes,
		size(int64(h.Written)), size(int64(h.Discards)), size(int64(h.Rewrites)))
	for from := 0; from < len(cells); from += cols {
		row := cells[from:min(from+cols, len(cells))]
		fmt.Fprintf(&b, "%10s |", size(int64(from)*cell))
		for _, n := range row {
			b.WriteRune(shade(n, most))
		}
		b.WriteString("|\n")
	}
	fmt.Fprintf(&b, "%10s  a cell is %s; '%c' is %s written, each shade before it a quarter\n", "", size(cell), shades[len(shades)-1], size(int64(most)))
	for _, why := range h.Unknown {
		fmt.Fprintf(&b, "%10s  what changed is unknown: %s\n", "", why)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// shade of n where most is the most there is.
func shade(n, most uint64) rune {
	if n == 0 {
		return shades[0]
	}
	s := len(shades) - 1
	for ; s > 1 && n < most; n *= 4 {
		if n > most/4 {
			break
		}
		s--
	}
	return shades[s]
}

// squeeze adds up neighbours until at most n values are left.
func squeeze(v []uint64, n int) []uint64 {
	per := (len(v) + n - 1) / n
	if per <= 1 {
		return v
	}
	out := make([]uint64, 0, n)
	for from := 0; from < len(v); from += per {
		var sum uint64
		for _, x := range v[from:min(from+per, len(v))] {
			sum += x
		}
		out = append(out, sum)
	}
	return out
}
