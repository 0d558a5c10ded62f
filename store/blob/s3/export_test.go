package s3

import "time"

// RetrySoon makes s retry without long pauses.
func RetrySoon(s *Store) { s.pause = time.Millisecond }
