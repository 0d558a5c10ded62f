package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What is known to be lost of a point is in the object damaged/<vm>/<time>-<id>.<n>, beside the
// point's; the highest n counts. See docs/format.md.
const damagePrefix = "damaged/"

// maxLost bounds the extents that are listed of one point. More are joined to one per disk.
const maxLost = 1 << 15

// Lost is an extent of a disk that can't be read any more, in bytes.
type Lost struct {
	Object string `json:"object"`         // that should hold it
	Disk   string `json:"disk,omitempty"` // empty: the whole point
	Off    int64  `json:"off"`
	Len    int64  `json:"len"`
	What   string `json:"what"` // for a person
}

// Damage is what of a point was lost when it was last looked at.
type Damage struct {
	Found time.Time `json:"found"`
	Lost  []Lost    `json:"lost"`
	// Records are what can't be read, by pack: nothing new may refer to it.
	Records []lostRecords `json:"records,omitempty"`
}

// Bytes is how much of the disks is lost.
func (d *Damage) Bytes() (n int64) {
	for _, l := range d.Lost {
		n += l.Len
	}
	return n
}

// lostRecords are ordinals of one pack, as runs [from, to).
type lostRecords struct {
	Pack PackID      `json:"pack"`
	Ords [][2]uint32 `json:"ords"`
}

func newDamage(found []missed) Damage {
	d := Damage{Found: time.Now().UTC()}
	slices.SortFunc(found, func(a, b missed) int { return cmp.Or(cmp.Compare(a.disk, b.disk), cmp.Compare(a.off, b.off)) })
	for _, m := range found {
		if n := len(d.Lost); n > 0 && d.Lost[n-1].joins(m) {
			d.Lost[n-1].Len += m.n
			continue
		}
		d.Lost = append(d.Lost, Lost{Object: m.object, Disk: m.disk, Off: m.off, Len: m.n, What: m.what})
	}
	if len(d.Lost) > maxLost {
		d.Lost = perDisk(d.Lost)
	}
	sets := newMarks()
	for _, m := range found {
		if !m.ref.IsZero() {
			sets.add(m.ref)
		}
	}
	for id, set := range sets.sets {
		d.Records = append(d.Records, lostRecords{id, set.runs()})
	}
	slices.SortFunc(d.Records, func(a, b lostRecords) int { return slices.Compare(a.Pack[:], b.Pack[:]) })
	return d
}

func (l *Lost) joins(m missed) bool {
	return l.Object == m.object && l.Disk == m.disk && l.Off+l.Len == m.off
}

// perDisk joins extents from the first to the last of each disk.
func perDisk(lost []Lost) (out []Lost) {
	for _, l := range lost {
		if n := len(out); n > 0 && out[n-1].Disk == l.Disk {
			out[n-1].Len = l.Off + l.Len - out[n-1].Off
			continue
		}
		l.What += ", and much more from here to the end of the extent"
		out = append(out, l)
	}
	return out
}

// runs returns the set as ascending runs [from, to).
func (o ordinals) runs() (out [][2]uint32) {
	for ord := range uint32(len(o) * 64) {
		switch n := len(out); {
		case !o.has(ord):
		case n > 0 && out[n-1][1] == ord:
			out[n-1][1]++
		default:
			out = append(out, [2]uint32{ord, ord + 1})
		}
	}
	return out
}

func (r *reader) damageObject(n PointName, number uint32) string {
	return fmt.Sprintf("%s.%d", damagePrefix+strings.TrimPrefix(r.pointObject(n), pointPrefix), number)
}

func (r *reader) parseDamageObject(object string) (n PointName, number uint32, ok bool) {
	at := strings.LastIndexByte(object, '.')
	if at < 0 {
		return n, 0, false
	}
	i, err := strconv.ParseUint(object[at+1:], 10, 32)
	if err != nil {
		return n, 0, false
	}
	n, ok = r.parsePointName(pointPrefix + strings.TrimPrefix(object[:at], damagePrefix))
	return n, uint32(i), ok && r.damageObject(n, uint32(i)) == object
}

// damageObjects returns the highest number of each point whose damage is noted, below a prefix.
func (r *Repo) damageObjects(ctx context.Context, prefix string) (map[PointName]uint32, error) {
	found := map[PointName]uint32{}
	for info, err := range r.blobs.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		if n, number, ok := r.parseDamageObject(info.Name); ok {
			found[n] = max(found[n], number)
		}
	}
	return found, nil
}

// dropStaleDamage is as damageObjects, and deletes the notes of points that are gone.
func (r *Repo) dropStaleDamage(ctx context.Context, prefix string) (map[PointName]uint32, error) {
	noted, err := r.damageObjects(ctx, prefix)
	if err != nil {
		return nil, err
	}
	for n := range noted {
		there, err := r.exists(ctx, r.pointObject(n))
		if err == nil && !there {
			err = r.dropDamage(ctx, n, 0)
		}
		if err != nil {
			return nil, err
		}
	}
	return noted, nil
}

// Damages returns which of a VM's points are known to be damaged, by [Repo.Repair]. A note that is damaged
// itself still says that its point is. It costs one listing, and one read for each.
func (r *Repo) Damages(ctx context.Context, vm string) (map[PointName]Damage, error) {
	if err := ValidVM(vm); err != nil {
		return nil, err
	}
	return r.damages(ctx, damagePrefix+r.folder(vm)+"/")
}

func (r *Repo) damages(ctx context.Context, prefix string) (map[PointName]Damage, error) {
	objects, err := r.damageObjects(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := map[PointName]Damage{}
	for n, number := range objects {
		var d Damage
		err := r.document(ctx, r.damageObject(n, number), "damage", &d)
		switch {
		case errors.Is(err, ErrNotFound):
			continue // repaired since
		case errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
			d = Damage{Lost: []Lost{{Object: r.damageObject(n, number), What: "the note of what is lost can't be read: " + err.Error()}}}
		case err != nil:
			return nil, err
		}
		out[n] = d
	}
	return out, nil
}

// lostRecords returns the records that are known to be unreadable; nil if there are none.
func (r *Repo) lostRecords(ctx context.Context) (*marks, error) {
	all, err := r.damages(ctx, damagePrefix)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	m := newMarks()
	for _, d := range all {
		d.mark(m)
	}
	return m, nil
}

// mark marks the records; runs that go back are left out.
func (d *Damage) mark(m *marks) {
	for _, p := range d.Records {
		at := uint32(0)
		for _, run := range p.Ords {
			for at = max(at, run[0]); at < min(run[1], maxPackEntries); at++ {
				m.add(Ref{Pack: p.Pack, Ord: at})
			}
		}
	}
}

// noteDamage makes d what is known of a point: nothing, if nothing is lost. The newest note is there before
// older ones go.
func (r *Repo) noteDamage(ctx context.Context, n PointName, d Damage) error {
	folder := damagePrefix + r.folder(n.VM) + "/"
	objects, err := r.damageObjects(ctx, folder)
	if err != nil {
		return err
	}
	last := objects[n]
	keep := uint32(0)
	if len(d.Lost) > 0 {
		var was Damage
		err := ErrNotFound
		if last > 0 {
			err = r.document(ctx, r.damageObject(n, last), "damage", &was)
		}
		if keep = last; err != nil || !slices.Equal(was.Lost, d.Lost) || !reflect.DeepEqual(was.Records, d.Records) {
			keep = last + 1
			if err := r.putDocument(ctx, r.damageObject(n, keep), "damage", d); err != nil {
				return err
			}
		}
	}
	return r.dropDamage(ctx, n, keep)
}

// dropDamage deletes the notes of a point but the one of number keep.
func (r *Repo) dropDamage(ctx context.Context, n PointName, keep uint32) error {
	notes, err := r.names(ctx, strings.TrimSuffix(r.damageObject(n, 0), "0"))
	if err != nil {
		return err
	}
	return r.removed(ctx, slices.DeleteFunc(notes, func(name string) bool {
		of, number, ok := r.parseDamageObject(name)
		return !ok || of != n || number == keep
	})...)
}

// FindWhole is as Find, but "latest", "proven" and times pass over points that are known to be damaged. By the start of its
// ID such a one is found all the same; damage is then what is lost of it. The error wraps ErrCorrupt if there are
// damaged points only.
func (r *Repo) FindWhole(ctx context.Context, ref string) (p *Point, damage *Damage, err error) {
	names, which, err := r.candidates(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	vm := names[0].VM
	known, err := r.Damages(ctx, vm)
	if err != nil {
		return nil, nil, err
	}
	if !startsID(which) && len(known) > 0 {
		whole := slices.DeleteFunc(slices.Clone(names), func(n PointName) bool { _, bad := known[n]; return bad })
		if len(whole) == 0 {
			return nil, nil, fmt.Errorf("%s: %w: all %d points of %s are damaged: name one by its ID to get what is left of it", ref, ErrCorrupt, len(names), vm)
		}
		names = whole
	}
	n, err := r.choose(ctx, names, which)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", ref, err)
	}
	if d, bad := known[n]; bad {
		damage = &d
	}
	p, err = r.Point(ctx, n)
	return p, damage, err
}
