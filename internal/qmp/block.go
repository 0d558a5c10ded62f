package qmp

import (
	"context"
	"strings"
)

// BlockNode is one node of QEMU's block graph (BlockDeviceInfo in QEMU's
// qapi/block-core.json).
type BlockNode struct {
	Name     string // node name, unique within the QEMU process
	Driver   string // "host_device", "file", "raw", "qcow2", "nbd", ...
	File     string // file name as QEMU tells it: a path, a URL or a json: string
	ReadOnly bool
	Size     int64 // virtual size in bytes

	// How the host's page cache is used (BlockdevCacheInfo): Direct is O_DIRECT;
	// Writeback is false if each write is flushed; NoFlush ignores flushes.
	Direct, Writeback, NoFlush bool
}

// HostPath is the path of the host file or device that the node opens itself,
// and false for nodes that open none: formats, filters, network.
func (n BlockNode) HostPath() (string, bool) {
	switch n.Driver {
	case "file", "host_device", "host_cdrom":
		// A json: name means options that no plain file name can express.
		p := strings.TrimPrefix(n.File, "file:")
		return p, p != "" && !strings.HasPrefix(p, "json:")
	}
	return "", false
}

// BlockNodes lists all nodes of the block graph (query-named-block-nodes,
// flat; QEMU 5.0 or later).
func (c *Client) BlockNodes(ctx context.Context) ([]BlockNode, error) {
	var wire []struct {
		Name  string `json:"node-name"`
		Drv   string `json:"drv"`
		File  string `json:"file"`
		RO    bool   `json:"ro"`
		Image struct {
			VirtualSize int64 `json:"virtual-size"`
		} `json:"image"`
		Cache struct {
			Direct    bool `json:"direct"`
			Writeback bool `json:"writeback"`
			NoFlush   bool `json:"no-flush"`
		} `json:"cache"`
	}
	// Not flat, each node would repeat its whole backing chain.
	args := map[string]any{"flat": true}
	if err := c.Execute(ctx, "query-named-block-nodes", args, &wire); err != nil {
		return nil, err
	}
	nodes := make([]BlockNode, len(wire))
	for i, w := range wire {
		nodes[i] = BlockNode{
			Name: w.Name, Driver: w.Drv, File: w.File, ReadOnly: w.RO, Size: w.Image.VirtualSize,
			Direct: w.Cache.Direct, Writeback: w.Cache.Writeback, NoFlush: w.Cache.NoFlush,
		}
	}
	return nodes, nil
}

// BlockDevice is a guest's drive and the top node behind it (BlockInfo in
// QEMU's qapi/block-core.json).
type BlockDevice struct {
	Device string // name given by -drive; empty for -device with a node name
	QDev   string // path or ID of the guest's device, may be empty
	Node   string // name of the top node; empty when no medium is in
	File   string // file name of the top node
	// IOStatus is "ok", "failed" or "nospace"; empty if the device keeps none.
	IOStatus string
}

// QueryBlock lists the guest's drives (query-block).
func (c *Client) QueryBlock(ctx context.Context) ([]BlockDevice, error) {
	var wire []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		IOStatus string `json:"io-status"`
		Inserted *struct {
			Node string `json:"node-name"`
			File string `json:"file"`
		} `json:"inserted"`
	}
	if err := c.Execute(ctx, "query-block", nil, &wire); err != nil {
		return nil, err
	}
	devs := make([]BlockDevice, len(wire))
	for i, w := range wire {
		devs[i] = BlockDevice{Device: w.Device, QDev: w.QDev, IOStatus: w.IOStatus}
		if w.Inserted != nil {
			devs[i].Node, devs[i].File = w.Inserted.Node, w.Inserted.File
		}
	}
	return devs, nil
}
