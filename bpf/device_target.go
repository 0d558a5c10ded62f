package bpf

import "time"

var _ Target = Device{}

// Label implements Target.
func (d Device) Label() string { return d.Path }

func (d Device) id() uint64 { return uint64(d.own()) }

func (d Device) shape(shift uint) shape {
	return shape{
		n: 1, granules: uint64(d.Size+(1<<shift)-1) >> shift, shift: shift, size: d.Size, start: uint64(d.Start) / 512,
		diskSeq: d.DiskSeq, table: d.Table, tracked: uint64(time.Now().UnixNano()),
	}
}

func (d Device) changed(since *Epoch) Loss {
	var l Loss
	if d.DiskSeq != since.DiskSeq() {
		l |= LossReplaced
	}
	if d.Size != since.Size() || d.Start != int64(since.hdr(hdrStart))*512 {
		l |= LossResized
	}
	if d.Table != since.hdr(hdrTable) {
		l |= LossTable
	}
	return l
}

func (d Device) lookAgain() (Target, error) { return d.again() }

func (d Device) settle() error { return nil }

func (d Device) heatShift() uint32 { return heatShift(uint64(d.Size) / 512) }

func (d Device) find(t *Tracker) (uint32, bool, error) {
	_, p, ok := t.devices.find(d.own())
	return p.slot, ok, nil
}

func (d Device) insert(t *Tracker, slot uint32, shift uint) error {
	return t.devices.insert(place{
		key: d.key(), own: d.own(), slot: slot, shift: uint32(shift), start: uint64(d.Start) / 512, sectors: uint64(d.Size) / 512,
		heatShift: d.heatShift(), whole: !d.Partition,
	})
}

func (d Device) remove(t *Tracker) error {
	if at, _, ok := t.devices.find(d.own()); ok {
		t.devices.remove(at)
	}
	return nil
}

func (d Device) programs(t *Tracker, _ bool) (programSet, error) { return blockPrograms{t}, nil }
