package store

import (
	"encoding/json"
	"testing"

	"github.com/tidemark/tidemark/store/blob"
)

func FuzzDamage(f *testing.F) {
	f.Add("damaged/a/20260102T030405.000000006Z-0123456789abcdef.3", []byte(`{"records":[{"pack":"00112233445566778899aabbccddeeff","ords":[[1,3],[2,9],[70000,80000]]}]}`))
	f.Add("damaged/a/20260102T030405.000000006Z-0123456789abcdef.03", []byte(`{"lost":[{"off":-1,"len":9223372036854775807}]}`))
	f.Add("damaged/a/20260102T030405.000000006Z-0123456789abcdef", []byte(`{}`))
	r := &reader{}
	f.Fuzz(func(t *testing.T, name string, body []byte) {
		if n, number, ok := r.parseDamageObject(name); ok && (r.damageObject(n, number) != name || !blob.ValidName(name)) {
			t.Errorf("%q is read as %+v, %d", name, n, number)
		}
		var d Damage
		if json.Unmarshal(body, &d) != nil {
			return
		}
		_ = d.Bytes()
		m := newMarks()
		d.mark(m)
		for id, set := range m.sets {
			if n := set.count(); n > maxPackEntries {
				t.Errorf("%d records of %s", n, id)
			}
			if runs := set.runs(); len(runs) > 0 && runs[len(runs)-1][1] > maxPackEntries {
				t.Errorf("runs of %s: %v", id, runs)
			}
		}
	})
}
