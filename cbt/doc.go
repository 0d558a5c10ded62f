// Package cbt answers one question about a disk: what may have changed since.
//
// It hides granules, bitmaps, epochs, change IDs and the judgement whether they
// can be believed. The answer is either a list of extents that provably holds
// every change, or "unknown", with the reasons: then the whole disk has to be
// compared. It never guesses.
//
// It may import bpf and no other package of Tidemark.
package cbt
