package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func (b *bench) measure(ctx context.Context, t *table) (err error) {
	for _, s := range t.Servers {
		s.Version = version(ctx, s.args[0], map[bool]string{true: "version", false: "--version"}[filepath.Base(s.args[0]) == "tidemark"])
		if s.args[1] == "-serve" {
			s.Version = "this program"
		}
		if err := s.start(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.stop()) }()
	}
	for _, r := range t.Rows {
		for range t.Servers {
			r.Cells = append(r.Cells, &cell{})
		}
	}
	for round := range b.rounds {
		for _, r := range t.Rows {
			for _, k := range measure.Turns(len(t.Servers), round) {
				if err := b.turn(ctx, r, r.Cells[k], t.Servers[k], round); err != nil {
					return fmt.Errorf("%s, %s: %w", r.Name, t.Servers[k].Name, err)
				}
			}
			b.say("round %d of %d: %s", round+1, b.rounds, r.Name)
		}
	}
	for _, r := range t.Rows {
		own := r.Cells[0]
		for _, c := range r.Cells[1:] {
			c.RateRatio, c.CPURatio = ratio(own.Rate, c.Rate), ratio(own.GiB, c.GiB)
			if len(c.P99) > 0 {
				c.P99Ratio = ratio(own.P99, c.P99)
			}
		}
	}
	return nil
}

func ratio(a, b measure.Sample) *measure.Interval {
	r := measure.Ratio(a, b)
	return &r
}

// turn is one server's turn with one load.
func (b *bench) turn(ctx context.Context, r *row, c *cell, s *server, round int) error {
	seed := b.seed + uint64(round)
	switch r.state {
	case cold:
		if err := s.chill(ctx); err != nil {
			return err
		}
	case warm:
		all := load{way: "read", block: 1 << 20, depth: 4, conns: 1, area: r.area, count: r.area >> 20}
		if _, err := all.run(ctx, s, b.size, b.seconds, seed); err != nil {
			return err
		}
	}
	before, err := s.cpu()
	if err != nil {
		return err
	}
	got, err := r.run(ctx, s, b.size, b.seconds, seed)
	if err != nil {
		return fmt.Errorf("%w: %s", err, measure.Tail(s.errs.String()))
	}
	after, err := s.cpu()
	if err != nil {
		return err
	}
	cpu := (after - before).Seconds()
	c.Rate = append(c.Rate, got.rate)
	c.Ops = append(c.Ops, got.rate/float64(got.bytes)*float64(got.ops))
	c.CPU = append(c.CPU, cpu*1e6/float64(got.ops))
	c.GiB = append(c.GiB, cpu/float64(got.bytes)*(1<<30))
	if got.p99 > 0 {
		c.P99 = append(c.P99, got.p99)
	}
	return nil
}

// chill starts a server anew, whose files are in nobody's memory.
func (s *server) chill(ctx context.Context) error {
	if len(s.cold) == 0 {
		return nil
	}
	if err := s.stop(); err != nil {
		return err
	}
	for _, path := range s.cold {
		if err := measure.Forget(path); err != nil {
			return err
		}
	}
	return s.start(ctx)
}
