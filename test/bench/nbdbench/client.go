package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/tidemark/tidemark/test/bench/measure"
)

// load is what a client asks of a server.
type load struct {
	way     string // read, write, randread, randwrite
	block   int    // bytes of a request
	depth   int    // requests under way, per connection
	conns   int
	area    int64 // bytes of the disk that are used; 0: all
	count   int64 // requests in all; 0: as many as there is time for
	nbdcopy bool  // reads all with nbdcopy instead of fio
}

// result is what a client saw.
type result struct {
	ops   int64
	bytes int64
	rate  float64 // bytes per second
	p99   float64 // of a request, in microseconds; 0: unknown
}

func (l load) run(ctx context.Context, s *server, size int64, seconds int, seed uint64) (result, error) {
	if l.nbdcopy {
		begin := time.Now()
		_, err := measure.Process{Path: "nbdcopy", Args: []string{"--connections=1", s.uri(), "null:"}}.Run(ctx)
		return result{ops: size / int64(l.block), bytes: size, rate: float64(size) / time.Since(begin).Seconds()}, err
	}
	args := []string{
		"--name=x", "--ioengine=nbd", "--uri=" + s.uri(), "--rw=" + l.way, fmt.Sprintf("--bs=%d", l.block),
		fmt.Sprintf("--iodepth=%d", l.depth), fmt.Sprintf("--numjobs=%d", l.conns), "--thread", "--group_reporting",
		fmt.Sprintf("--randseed=%d", seed), "--norandommap", "--output-format=json",
	}
	if l.area > 0 {
		args = append(args, fmt.Sprintf("--size=%d", l.area))
	}
	switch {
	case l.count > 0:
		args = append(args, fmt.Sprintf("--io_size=%d", l.count*int64(l.block)))
	default:
		args = append(args, "--time_based", fmt.Sprintf("--runtime=%d", seconds))
	}
	d, err := measure.Process{Path: "fio", Args: args}.Run(ctx)
	if err != nil {
		return result{}, err
	}
	return parseFio(d.Out)
}

// parseFio reads fio's JSON.
func parseFio(out []byte) (result, error) {
	// fio prints notes before the JSON.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	type way struct {
		Rate  float64 `json:"bw_bytes"`
		Total int64   `json:"total_ios"`
		Bytes int64   `json:"io_bytes"`
		Clat  struct {
			Percentile map[string]float64 `json:"percentile"` // ns
		} `json:"clat_ns"`
	}
	var doc struct {
		Jobs []struct {
			Error int `json:"error"`
			Read  way `json:"read"`
			Write way `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return result{}, fmt.Errorf("fio's output: %w", err)
	}
	if len(doc.Jobs) != 1 {
		return result{}, fmt.Errorf("fio reports %d jobs", len(doc.Jobs))
	}
	j := doc.Jobs[0]
	if j.Error != 0 {
		return result{}, fmt.Errorf("fio reports error %d", j.Error)
	}
	w := j.Read
	if w.Total == 0 {
		w = j.Write
	}
	if w.Total <= 0 || w.Rate <= 0 {
		return result{}, errors.New("fio did nothing")
	}
	return result{ops: w.Total, bytes: w.Bytes, rate: w.Rate, p99: w.Clat.Percentile["99.000000"] / 1e3}, nil
}
