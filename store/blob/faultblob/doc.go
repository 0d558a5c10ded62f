// Package faultblob makes storage fail in tests: it puts a Layer between a program and its
// blob.Store, numbers every moment at which something can go wrong, and asks a
// Handler what does.
//
// Each operation of a Store has a moment before it (an error there means: nothing happened), one after
// it (it happened, and the answer is lost), and Put, Get, ReadAt, ReadTail and List have one in the middle:
// half of the bytes, or one entry, went through. Each system call by which a blob.Dir changes what is
// stored is a moment too, if the Dir is watched, and so is each request of an S3 client (Requests).
//
// # Killing a program at every moment
//
// A test binary starts itself as a child (Main, Run). The child's Job runs the program under test over
// a Layer that kills the process at one moment, and says what was acknowledged to it:
//
//	func TestMain(m *testing.M) {
//		faultblob.Main(map[string]faultblob.Job{"backup": func(ctx context.Context, l *faultblob.Layer, say func(string), args []string) error {
//			dir, err := blob.OpenDir(args[0])
//			...
//			l.Watch(dir)                // before its first use
//			s := l.Over(dir)
//			... the program; say("...") when it reports something as done
//		}})
//		os.Exit(m.Run())
//	}
//
//	dry := faultblob.Run(t, 0, "backup", location)  // how many moments are there?
//	for at := int64(1); at <= dry.Moments; at++ {
//		o := faultblob.Run(t, at, "backup", location)
//		... what o.Said was done must be there, and nothing by halves
//	}
//
// Only moments that change what is stored count. One Layer may lie over several stores: they are numbered
// together. Where goroutines race, moments change places between runs, so a child may come to its end (o.Killed is
// empty); over all runs they are met all the same.
//
// A process that is killed leaves what it gave to the kernel. What a power failure leaves is
// less: with Lose, a child takes back, before it dies and also at its end, what it changed in a watched Dir's folders
// and did not sync.
//
// # Failing, slow, torn, repeated, out of order
//
// FailAt, Random and Delays are Handlers; All joins several. ErrRepeat makes an operation happen
// twice. Stale hides what was put last from listings.
package faultblob
