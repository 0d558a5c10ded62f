package main

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
)

// render makes the table: a grid for the eye, then a line for each cell.
func render(all []result) string {
	var b strings.Builder
	var kinds []string
	for _, r := range all {
		for _, c := range r.kinds {
			if !slices.Contains(kinds, c.name) {
				kinds = append(kinds, c.name)
			}
		}
	}

	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(first string, of func(r *result) string) {
		_, _ = fmt.Fprint(w, first)
		for i := range all {
			_, _ = fmt.Fprint(w, "\t", of(&all[i]))
		}
		_, _ = fmt.Fprintln(w)
	}
	row("KIND", short)
	for _, k := range kinds {
		row(k, func(r *result) string { return r.grid(k) })
	}
	row("other tests", func(r *result) string { return r.others() })
	row("doctor", func(r *result) string {
		switch {
		case len(r.exits) == 0:
			return "-"
		case r.exits[0] == 0:
			return "ok"
		}
		return fmt.Sprintf("exit %d", r.exits[0])
	})
	_ = w.Flush()

	b.WriteString("\nok WRITES/EPOCHS: random writes issued by fio, epoch swaps; nothing missed, no epoch unknown\n\n")
	w = tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "KERNEL\tKIND\tRESULT\tROUNDS\tEPOCHS\tWRITES\tTRIMS\tZEROES\tWRITTEN\tDELTAS\tMISSED\tUNKNOWN\tNOTE")
	for _, r := range all {
		for _, c := range r.kinds {
			n := func(key string) string {
				if v := c.numbers[key]; v != "" {
					return v
				}
				return "-"
			}
			_, _ = fmt.Fprintln(w, strings.Join([]string{
				short(&r), c.name, c.says(), n("rounds"), n("epochs"), n("writes"), n("trims"), n("zeroes"), n("written"), n("deltas"), n("missed"), n("unknown"), c.note,
			}, "\t"))
		}
	}
	_ = w.Flush()

	b.WriteByte('\n')
	for _, r := range all {
		b.WriteString(r.summary() + "\n")
		if len(r.missing) > 0 {
			b.WriteString("  modules it has not: " + strings.Join(r.missing, " ") + "\n")
		}
		for _, c := range r.tests {
			if c.verdict != "PASS" {
				b.WriteString("  " + c.name + ": " + c.says() + ": " + c.note + "\n")
			}
		}
	}
	return b.String()
}

// short names a kernel in the head of a column.
func short(r *result) string {
	if r.release == "" {
		return r.kernel
	}
	return strings.TrimSuffix(r.release, "-amd64")
}

func (c *cell) says() string {
	switch c.verdict {
	case "PASS":
		return "ok"
	case "":
		return "UNFINISHED"
	case "FAIL":
		if m := c.numbers["missed"]; m != "" && m != "0" {
			return "MISSED " + m
		}
		// Nothing was lost, but the tracker could not know, and would compare.
		if u := c.numbers["unknown"]; u != "" && u != "0" {
			return "UNKNOWN " + u
		}
		return "FAIL"
	}
	return strings.ToLower(c.verdict)
}

// grid is what stands in the grid for one kind.
func (r *result) grid(kind string) string {
	for _, c := range r.kinds {
		if c.name != kind {
			continue
		}
		if c.verdict == "PASS" {
			return fmt.Sprintf("ok %s/%s", c.numbers["writes"], c.numbers["epochs"])
		}
		return c.says()
	}
	if r.absent != "" {
		return "no kernel"
	}
	return "-"
}

func (r *result) others() string {
	passed, skipped := 0, 0
	for _, c := range r.tests {
		switch c.verdict {
		case "PASS":
			passed++
		case "SKIP":
			skipped++
		default:
			return "FAIL " + c.name
		}
	}
	if len(r.tests) == 0 {
		return "-"
	}
	return fmt.Sprintf("ok %d, %d skipped", passed, skipped)
}
