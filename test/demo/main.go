// Command demo does Tidemark's main job once, and prints what happened.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/tidemark/tidemark/test/mainjob"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo PATH-OF-TIDEMARK")
		os.Exit(2)
	}
	if err := demo(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func demo(binary string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("needs root: it attaches BPF programs and loop devices")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "tidemark-demo-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	begin := time.Now()
	r, err := mainjob.Run(ctx, mainjob.Options{
		Binary: binary, Dir: dir, Out: os.Stdout, Incrementals: 3, DiskSize: 1 << 30, PauseBudget: 500 * time.Millisecond,
	})
	if err != nil {
		return err
	}
	r.Print(os.Stdout)
	fmt.Printf("all of this took %v\n", time.Since(begin).Round(time.Second))
	return nil
}
