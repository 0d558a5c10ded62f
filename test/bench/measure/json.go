package measure

import (
	"encoding/json"
	"io"
)

// WriteJSON writes a report as others read it.
func WriteJSON(w io.Writer, report any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(report)
}
