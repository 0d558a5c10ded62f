package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

const (
	pointPrefix  = "points/"
	pointMagic   = "tidemark-point "
	pointVersion = 1
	maxPointLen  = 16 << 20

	// pointTime sorts as text as it does as time.
	pointTime = "20060102T150405.000000000Z"
)

// PointName says which point, without its document.
type PointName struct {
	VM   string    `json:"vm"`
	ID   string    `json:"id"` // 16 hex digits: the start of the document's hash
	Time time.Time `json:"time"`
}

// String returns the name as a user may give it to [Repo.Find].
func (n PointName) String() string { return n.VM + "@" + n.ID }

// pointFolder is the folder of a VM's points.
func (r *reader) pointFolder(vm string) string { return pointPrefix + r.folder(vm) + "/" }

// pointObject returns the name of the document's object.
func (r *reader) pointObject(n PointName) string {
	return r.pointFolder(n.VM) + n.Time.UTC().Format(pointTime) + "-" + n.ID
}

// parsePointName reads what pointObject wrote.
func (r *reader) parsePointName(object string) (PointName, bool) {
	folder, base, ok := strings.Cut(strings.TrimPrefix(object, pointPrefix), "/")
	if !ok || len(base) != len(pointTime)+17 {
		return PointName{}, false
	}
	vm, ok := r.vmOf(folder)
	if !ok {
		return PointName{}, false
	}
	t, err := time.Parse(pointTime, base[:len(pointTime)])
	if err != nil {
		return PointName{}, false
	}
	n := PointName{VM: vm, ID: base[len(pointTime)+1:], Time: t.UTC()}
	return n, isHex(n.ID) && r.pointObject(n) == object
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// ValidVM tells whether name can name a VM: 1 to 64 of A-Z a-z 0-9 . _ -, the
// first a letter or digit. Such a name is safe as a folder and in object names.
func ValidVM(name string) error {
	ok := len(name) >= 1 && len(name) <= 64
	for i := 0; i < len(name) && ok; i++ {
		switch c := name[i]; {
		case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '.', c == '_', c == '-':
			ok = i > 0
		default:
			ok = false
		}
	}
	if !ok {
		return fmt.Errorf("%w: VM name %q: want 1 to 64 of A-Z a-z 0-9 . _ - that begin with a letter or digit", ErrInvalid, name)
	}
	return nil
}

// pointBody is the document without its first line: a Point whose ID is left
// out, since it comes from the document's hash.
type pointBody struct {
	Version int `json:"version"`
	*plainPoint
	ID *string `json:"id,omitempty"`
}

type plainPoint Point

// encodePoint returns the document and the ID of p.
func encodePoint(p *Point, ids *hasher) (doc []byte, id string, err error) {
	body, err := json.Marshal(pointBody{Version: pointVersion, plainPoint: (*plainPoint)(p)})
	if err != nil {
		return nil, "", fmt.Errorf("encode point: %w", err)
	}
	body = append(body, '\n')
	h := ids.sum(body).String()
	doc = fmt.Appendf(nil, "%s%d %s\n", pointMagic, pointVersion, h)
	if len(doc)+len(body) > maxPointLen {
		return nil, "", fmt.Errorf("%w: the point's document has %d bytes, the most is %d", ErrInvalid, len(doc)+len(body), maxPointLen)
	}
	return append(doc, body...), h[:16], nil
}

// decodePoint reads the document of the object and checks that it is the one
// that n names.
func decodePoint(doc []byte, object string, n PointName, ids *hasher) (*Point, error) {
	corrupt := func(what string) error { return &CorruptError{object, what} }

	head, body, ok := bytes.Cut(doc, []byte("\n"))
	if !ok {
		return nil, corrupt("not the document of a point")
	}
	h := ids.sum(body).String()
	version, hash, _ := strings.Cut(strings.TrimPrefix(string(head), pointMagic), " ")
	if hash != h || h[:len(n.ID)] != n.ID {
		return nil, corrupt("the document does not match its hash")
	}
	b := pointBody{plainPoint: &plainPoint{}}
	err := json.Unmarshal(body, &b)
	// The hash was right: now a newer version is no damage.
	if b.Version > pointVersion && string(head) == fmt.Sprintf("%s%d %s", pointMagic, b.Version, h) {
		return nil, fmt.Errorf("%s: %w: point version %d", object, ErrVersion, b.Version)
	}
	if b.Version != pointVersion || version != fmt.Sprint(pointVersion) || !bytes.HasPrefix(head, []byte(pointMagic)) {
		return nil, corrupt("bad first line")
	}
	if err != nil {
		return nil, corrupt(err.Error())
	}
	p := (*Point)(b.plainPoint)
	p.ID = n.ID
	if b.ID != nil || p.VM != n.VM || !p.Time.Equal(n.Time) {
		return nil, corrupt("it is the document of another point")
	}
	p.Time = p.Time.UTC()
	if err := p.validate(); err != nil {
		return nil, corrupt(err.Error())
	}
	return p, nil
}

// validate tells whether p can be published.
func (p *Point) validate() error {
	if err := ValidVM(p.VM); err != nil {
		return err
	}
	if y := p.Time.Year(); y < 1970 || y > 9999 {
		return fmt.Errorf("%w: time of point in year %d", ErrInvalid, y)
	}
	switch p.Consistency {
	case Crash, Filesystem, None:
	default:
		return fmt.Errorf("%w: consistency %q", ErrInvalid, p.Consistency)
	}
	if len(p.Disks) == 0 {
		return fmt.Errorf("%w: point without disks", ErrInvalid)
	}
	names := make(map[string]bool, len(p.Disks))
	for i := range p.Disks {
		d := &p.Disks[i]
		if err := validDiskName(d.Name); err != nil {
			return err
		}
		if names[d.Name] {
			return fmt.Errorf("%w: two disks named %q", ErrInvalid, d.Name)
		}
		names[d.Name] = true
		if err := d.Root.validate(); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	return nil
}

func validDiskName(name string) error {
	if ValidVM(name) != nil {
		return fmt.Errorf("%w: disk name %q", ErrInvalid, name)
	}
	return nil
}
