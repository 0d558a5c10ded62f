package main

import (
	"context"
	"fmt"

	"github.com/tidemark/tidemark/test/bench/measure"
)

func (b *bench) measure(ctx context.Context) error {
	for _, t := range b.tools {
		var err error
		if t.Full, err = b.back(ctx, t, 0); err != nil {
			return fmt.Errorf("%s, full: %w", t.Name, err)
		}
		b.say("full: %s took %.1f s", t.Name, t.Full.Seconds)
		if t.verifyEach {
			if err := t.check(ctx); err != nil {
				return err
			}
		}
	}
	for round := 1; round <= b.rounds; round++ {
		n, err := change(b.dev, changes(b.size, b.percent, b.seed, round), b.seed, round)
		if err != nil {
			return fmt.Errorf("change %s: %w", b.dev, err)
		}
		b.say("round %d of %d: changed %d KiB", round, b.rounds, n>>10)
		for _, k := range measure.Turns(len(b.tools), round) {
			t := b.tools[k]
			v, err := b.back(ctx, t, round)
			if err != nil {
				return fmt.Errorf("%s, incremental %d: %w", t.Name, round, err)
			}
			t.Seconds, t.CPUSeconds = append(t.Seconds, v.Seconds), append(t.CPUSeconds, v.CPUSeconds)
			t.Read, t.Stored = append(t.Read, float64(v.Read)), append(t.Stored, float64(v.Stored))
			b.say("round %d of %d: %s took %.3f s", round, b.rounds, t.Name, v.Seconds)
		}
		// Not in between: restoring would warm caches for whoever comes next.
		for _, t := range b.tools {
			if t.verifyEach || round == b.rounds {
				if err := t.check(ctx); err != nil {
					return err
				}
			}
		}
	}
	for _, t := range b.tools[1:] {
		r := measure.Ratio(t.Seconds, b.tools[0].Seconds)
		t.Ratio = &r
	}
	return nil
}

// check ends the run if one of our points is wrong. What others made wrong is told, and the numbers
// of all with it.
func (t *tool) check(ctx context.Context) error {
	err := t.verify(ctx)
	if err == nil {
		t.Verified++
		return nil
	}
	err = fmt.Errorf("%s: its backup could not be verified: %w", t.Name, err)
	if t.verifyEach || ctx.Err() != nil {
		return err
	}
	t.Problem = err.Error()
	return nil
}
