package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// completeTime is how long the shell may wait for a repository.
const completeTime = 3 * time.Second

// completePoint completes NAME@POINT: names of VMs, then what can follow the @.
func (g *globals) completePoint(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(c.Context(), completeTime)
	defer cancel()
	repo, err := g.open(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer func() { _ = repo.Close() }()
	name, _, named := strings.Cut(typed, "@")
	var out []string
	if !named {
		vms, err := repo.VMs(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		for _, vm := range vms {
			out = append(out, vm+"@")
		}
		return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
	points, err := repo.Points(ctx, name)
	if err != nil || len(points) == 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	out = append(out, name+"@latest\tthe newest", name+"@proven\tthe newest that was seen to boot")
	for _, p := range points {
		out = append(out, p.String()+"\t"+clock(p.Time))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
