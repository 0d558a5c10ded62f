// Package blob puts and gets the repository's objects.
//
// It hides where they lie: in a local directory here, in S3-compatible storage in
// package s3; how an object appears at once or not at all; and how it outlives power
// loss. It knows nothing of what is in them. It imports no other package of
// Tidemark.
package blob
