// Command model checks protocols with Spin: that of epochs and that of garbage collection. As it is
// each must keep its properties in every state within the bounds, and each broken variant must lose one.
// It needs spin and gcc, and ends with 1 if anything is not as expected.
package main

import (
	"context"
	"embed"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

//go:embed *.pml
var models embed.FS

// memory that one search may take, in MiB. One that needs more has not proven anything.
const memory = 2500

// limit of one search; on an idle machine each takes seconds.
const limit = 10 * time.Minute

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "model:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	begin := time.Now()
	results := make([][]result, len(protocols))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(min(2, runtime.NumCPU()))
	searches := 0
	for i, p := range protocols {
		results[i] = make([]result, len(p.checks))
		searches += len(p.checks)
		for j, c := range p.checks {
			g.Go(func() (err error) {
				if results[i][j], err = c.search(ctx, p.file); err != nil {
					err = fmt.Errorf("%s: %w", c.name, err)
				}
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	bad := 0
	for i, p := range protocols {
		bad += p.report(results[i])
	}
	fmt.Printf("\n%d searches in %v, ", searches, time.Since(begin).Round(time.Second))
	if bad > 0 {
		fmt.Println("not all as expected")
		return fmt.Errorf("%d of %d searches did not end as expected", bad, searches)
	}
	fmt.Println("all as expected")
	return nil
}

// report prints what was found and returns how much of it was not expected.
func (p protocol) report(results []result) (bad int) {
	fmt.Printf("\n%s\n\nProperties\n", strings.ToUpper(p.name))
	for _, q := range p.properties {
		fmt.Printf("  %s  %s\n", q.name, q.says)
	}
	fmt.Println("\nThe protocol as it is")
	for i, c := range p.checks {
		if c.expect == "" {
			bad += c.report(results[i], p.asserted(c))
		}
	}
	fmt.Println("\nBroken variants: each must lose a property. " + p.begins)
	for i, c := range p.checks {
		if c.expect != "" {
			bad += c.report(results[i], nil)
		}
	}
	return bad
}

// report prints what was found and returns 1 if that was not expected.
func (c check) report(r result, asserted []string) int {
	name := "\n  " + c.name
	if len(c.macros) > 0 {
		name += fmt.Sprintf(" (%s)", strings.Join(c.macros, " "))
	}
	if c.expect == "" {
		if r.violated == "" && r.complete {
			fmt.Printf("%s\n    %s hold: %d states, depth %d, all explored\n", name, strings.Join(asserted, ", "), r.states, r.depth)
			return 0
		}
		if r.violated == "" {
			fmt.Printf("%s\n    NOT PROVEN: %s\n", name, r.why)
			return 1
		}
		fmt.Printf("%s\n    %s DOES NOT HOLD:\n", name, r.violated)
		printTrace(r.trace)
		return 1
	}
	switch {
	case r.violated == c.expect:
		fmt.Printf("%s\n    counterexample to %s, as expected (the shortest; %d states):\n", name, r.violated, r.states)
	case r.violated != "":
		fmt.Printf("%s\n    COUNTEREXAMPLE TO %s, EXPECTED ONE TO %s:\n", name, r.violated, c.expect)
	default:
		fmt.Printf("%s\n    NO COUNTEREXAMPLE, EXPECTED ONE TO %s (%d states, all explored: %v %s)\n", name, c.expect, r.states, r.complete, r.why)
		return 1
	}
	printTrace(r.trace)
	if r.violated != c.expect {
		return 1
	}
	return 0
}

func printTrace(steps []step) {
	for i, s := range steps {
		fmt.Printf("    %3d  %-9s %s\n", i+1, s.who, s.what)
	}
}

// search explores the check's states: for a variant breadth first, so that the trace
// it finds is a shortest one.
func (c check) search(ctx context.Context, file string) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	dir, err := os.MkdirTemp("", "tidemark-model-")
	if err != nil {
		return result{}, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	model, err := models.ReadFile(file)
	if err != nil {
		return result{}, err
	}
	if err := os.WriteFile(filepath.Join(dir, file), model, 0o600); err != nil {
		return result{}, err
	}
	var macros []string
	for _, m := range c.macros {
		macros = append(macros, "-D"+m)
	}
	compile := []string{"-w", "-O2", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=" + strconv.Itoa(memory), "-o", "pan", "pan.c"}
	if c.expect != "" {
		macros = append(macros, "-DSHORTEST")
		compile = append(compile, "-DBFS")
	}
	if _, err := tool(ctx, dir, "spin", append(macros, "-a", file)...); err != nil {
		return result{}, err
	}
	if _, err := tool(ctx, dir, "gcc", compile...); err != nil {
		return result{}, err
	}
	out, err := tool(ctx, dir, "./pan", "-m100000")
	if err != nil {
		return result{}, err
	}
	r, err := parseSearch(out)
	if err != nil || !r.failed {
		return r, err
	}
	if out, err = tool(ctx, dir, "spin", append(macros, "-t", "-T", file)...); err != nil {
		return result{}, err
	}
	r.trace, r.violated = parseTrace(out)
	if r.violated == "" {
		return r, fmt.Errorf("the model itself is wrong: %s", out)
	}
	return r, nil
}

func tool(ctx context.Context, dir, name string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = dir
	out, err := c.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %.2000s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
