package fusefs

// Known tells whether the kernel knows the node of this path.
func (s *Server) Known(path ...string) bool {
	n := s.tree.root.EmbeddedInode()
	for _, name := range path {
		if n = n.GetChild(name); n == nil {
			return false
		}
	}
	return true
}
