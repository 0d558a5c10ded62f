package store

import (
	"math/rand/v2"
	"testing"
)

// TestRequestsOfMarking bounds what a collection asks for per point: the nodes of one level of all
// points together, not each.
func TestRequestsOfMarking(t *testing.T) {
	r := testRepo(t)
	r.dataPackLen, r.nodePackLen = dataPackLen, nodePackLen
	const size, points, changes = 64 << 30, 20, 60
	rnd := rand.New(rand.NewPCG(1, 1))
	for i := range points {
		var ws []write
		for range changes {
			g := rnd.Int64N(size / k64)
			ws = append(ws, write{g * k64, noise(uint64(i)<<32|uint64(g), k64)})
		}
		backup(t, r, DiskOptions{Size: size}, ws...)
	}
	c := counting(r)
	rep, err := r.GC(t.Context(), GCOptions{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	requests, bytes, ops := c.since()
	t.Logf("%d points, %d nodes: %d requests, %.1f per point, %d bytes, %v", rep.Points, rep.Nodes, requests, float64(requests)/points, bytes, ops)
	// A point: its document; a pack of nodes and one of grains, of which the index is an end and a header, read once for marking
	// and once for what is garbage; in the pack of nodes, a request for each of 4 levels.
	if rep.Points != points || rep.Nodes < points*changes || requests > points*14 {
		t.Errorf("%d points with %d nodes took %d requests", rep.Points, rep.Nodes, requests)
	}
}
