// Package e2e tests the tidemark binary from end to end on real parts.
package e2e
