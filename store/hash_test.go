package store

import (
	"bytes"
	"testing"

	"lukechampine.com/blake3"
)

func TestSumIsBLAKE3(t *testing.T) {
	for _, n := range []int{0, 1, 1000, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 48 << 10, 64 << 10, 65537, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20} {
		p := noise(uint64(n), n)
		if got, want := plainHasher.sum(p), blake3.Sum256(p); got != want {
			t.Errorf("%d bytes: %s, want %x", n, got, want)
		}
		key := [32]byte(noise(1, 32))
		b := blake3.New(32, key[:])
		_, _ = b.Write(p)
		if got := newHasher(key).sum(p); !bytes.Equal(got[:], b.Sum(nil)) {
			t.Errorf("%d bytes, keyed: %s", n, got)
		}
	}
	// The reference's test vectors: input is 0, 1, ..., 250, 0, ...
	p := make([]byte, 31744)
	for i := range p {
		p[i] = byte(i % 251)
	}
	if got := plainHasher.sum(p).String(); got != "62b6960e1a44bcc1eb1a611a8d6235b6b4b78f32e7abc4fb4c6cdcce94895c47" {
		t.Errorf("test vector: %s", got)
	}
}

func BenchmarkSum(b *testing.B) {
	p := noise(1, k64)
	b.Run("ours", func(b *testing.B) {
		b.SetBytes(k64)
		b.ReportAllocs()
		for b.Loop() {
			_ = plainHasher.sum(p)
		}
	})
	b.Run("library", func(b *testing.B) {
		b.SetBytes(k64)
		b.ReportAllocs()
		for b.Loop() {
			_ = blake3.Sum256(p)
		}
	})
}
