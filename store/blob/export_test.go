package blob

// UseNamedTempFiles makes d behave as on a file system without O_TMPFILE.
func UseNamedTempFiles(d *Dir) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.named = true
}
