package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/tidemark/tidemark/bpf"
	"github.com/tidemark/tidemark/test/bench/measure"
)

// cell is one device under one load.
type cell struct {
	Device string    `json:"device"`
	Bytes  int64     `json:"bytes"`
	Load   load      `json:"load"`
	Writes int64     `json:"writes"` // of each run
	Layers []*result `json:"layers"`

	dev *device
}

// result is what one layer showed in one cell. Samples have one value per round; processor times
// are microseconds per write.
type result struct {
	Layer   string         `json:"layer"`
	IOPS    measure.Sample `json:"iops"`
	Fio     measure.Sample `json:"fio_us"`
	Kernel  measure.Sample `json:"kernel_threads_us"`
	Machine measure.Sample `json:"machine_us"`
	Others  measure.Sample `json:"others"` // share of the machine used by neither, 0 to 1

	// Against layer none; nil for none itself.
	IOPSRatio    *measure.Interval `json:"iops_ratio,omitempty"`
	MachineRatio *measure.Interval `json:"machine_ratio,omitempty"`

	Refused  string      `json:"refused,omitempty"` // why it could not be measured
	Programs [][]program `json:"programs,omitempty"`

	layer layer
}

func (b *bench) measure(ctx context.Context, cells []*cell) error {
	for _, c := range cells {
		warm, err := c.Load.forTime(ctx, c.dev.path, b.seed, b.seconds)
		if err != nil {
			return fmt.Errorf("%s: %w", c.Device, err)
		}
		c.Writes = warm.writes
		for _, l := range b.layers {
			r := &result{Layer: l.name, layer: l}
			if l.side && c.dev.side == "" {
				r.Refused = "no disk beside it was given"
			}
			c.Layers = append(c.Layers, r)
		}
	}
	for round := range b.rounds {
		for _, c := range cells {
			for _, k := range measure.Turns(len(c.Layers), round) {
				if err := b.once(ctx, c, c.Layers[k], round); err != nil {
					return fmt.Errorf("%s, %s, %s: %w", c.Device, c.Load, c.Layers[k].Layer, err)
				}
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s, %s\n", round+1, b.rounds, c.Device, c.Load)
		}
	}
	for round := range b.statRounds {
		for _, c := range cells {
			for _, r := range c.Layers {
				if err := b.statistics(ctx, c, r, round); err != nil {
					return fmt.Errorf("%s, %s, %s, with statistics: %w", c.Device, c.Load, r.Layer, err)
				}
			}
		}
	}
	for _, c := range cells {
		none := c.Layers[0]
		for _, r := range c.Layers[1:] {
			if r.Refused == "" {
				iops, machine := measure.Ratio(r.IOPS, none.IOPS), measure.Ratio(r.Machine, none.Machine)
				r.IOPSRatio, r.MachineRatio = &iops, &machine
			}
		}
	}
	return nil
}

// under calls do with the layer laid over the cell's device.
func (b *bench) under(ctx context.Context, c *cell, r *result, do func(l *laid) error) (err error) {
	if r.Refused != "" {
		return nil
	}
	l, err := r.layer.put(ctx, b, c.dev)
	if errors.Is(err, bpf.ErrUntrackable) {
		r.Refused = err.Error()
		return nil
	}
	if err != nil {
		return err
	}
	if l.remove != nil {
		// What was laid is lifted also when it was interrupted.
		defer func() { err = errors.Join(err, l.remove(context.WithoutCancel(ctx))) }()
	}
	if err := do(l); err != nil {
		return err
	}
	if l.check != nil {
		return l.check(ctx)
	}
	return nil
}

func (b *bench) once(ctx context.Context, c *cell, r *result, round int) error {
	return b.under(ctx, c, r, func(l *laid) error {
		v, err := c.Load.count(ctx, l.path, b.seed+uint64(round), c.Writes)
		if err != nil {
			return err
		}
		r.IOPS = append(r.IOPS, v.iops)
		r.Fio = append(r.Fio, v.perWrite(v.fio))
		r.Kernel = append(r.Kernel, v.perWrite(v.machine.Kernel))
		r.Machine = append(r.Machine, v.perWrite(v.machine.Busy))
		r.Others = append(r.Others, v.others(b.host.CPUs))
		return nil
	})
}

// statistics makes a run that counts only for what the programs did.
func (b *bench) statistics(ctx context.Context, c *cell, r *result, round int) error {
	if r.Layer != "attached" && r.Layer != "tracked" {
		return nil
	}
	return b.under(ctx, c, r, func(l *laid) error {
		p, err := newCounter(l.tracker).during(func() (int64, error) {
			v, err := c.Load.count(ctx, l.path, b.seed+uint64(round), c.Writes)
			return v.writes, err
		})
		r.Programs = append(r.Programs, p)
		return err
	})
}
