package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/protocol"
	gonbd "github.com/pojntfx/go-nbd/pkg/server"
)

// go-nbd is a server and a set of definitions that others wrote. Its client
// cannot be used here: it attaches a kernel device before it says anything, and
// sends GO with a wrong length.

// TestSameAnswersAsGoNBD has our test client hold the same session with both
// servers: it shows that the client, on which most tests stand, is understood by
// a server that is not ours, and that both do the same to a disk.
func TestSameAnswersAsGoNBD(t *testing.T) {
	const size = 1 << 20
	memory, ours := make([]byte, size), newMemDisk(size)

	theirs := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", theirs)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			err = gonbd.Handle(c, []*gonbd.Export{{Name: "disk", Backend: backend.NewMemoryBackend(memory)}}, nil)
			err = errors.Join(err, c.Close())
		}
		served <- err
	}()
	socket, _ := start(t, &Server{Exports: static(t, Export{Name: "disk", Disk: ours})})

	session := func(path string) (transcript []byte) {
		p := dial(t, "unix", path)
		p.get(18) // ours adds NO_ZEROES
		p.put(uint32(1))
		if k := last(p.option(7, goData("disk", infoBlockSize))); k != protocol.NEGOTIATION_TYPE_REPLY_ACK {
			t.Fatalf("GO: %#x", k)
		}
		for i, c := range []struct {
			cmd    uint16
			off, n int
		}{{1, 0, 4096}, {0, 0, 8192}, {1, 100001, 77777}, {0, 100000, 80000}, {1, size - 10, 10}, {0, size - 20, 20}, {0, 0, size}} {
			p.request(0, c.cmd, uint64(i), uint64(c.off), uint32(c.n))
			n := c.n
			if c.cmd == 1 {
				p.put(pattern(c.n, byte(i)))
				n = 0
			}
			transcript = append(transcript, p.get(16+n)...)
		}
		p.request(0, 2, 99, 0, 0)
		return transcript
	}
	if a, b := session(socket), session(theirs); !bytes.Equal(a, b) {
		t.Error("the replies differ")
	}
	if err := <-served; err != nil {
		t.Errorf("go-nbd: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(ours, 0, size))
	if err != nil || !bytes.Equal(got, memory) {
		t.Errorf("the disks differ, %v", err)
	}
}

// TestRepliesDecodeWithGoNBDStructs reads our negotiation with go-nbd's structs.
func TestRepliesDecodeWithGoNBDStructs(t *testing.T) {
	socket, _ := start(t, &Server{Exports: static(t, Export{Name: "disk", Description: "text", Disk: newMemDisk(1 << 20), ReadOnly: true})})
	p := dial(t, "unix", socket)
	decode := func(v any) {
		t.Helper()
		if err := binary.Read(p, binary.BigEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	var hello protocol.NegotiationNewstyleHeader
	decode(&hello)
	if hello.OldstyleMagic != protocol.NEGOTIATION_MAGIC_OLDSTYLE || hello.OptionMagic != protocol.NEGOTIATION_MAGIC_OPTION ||
		hello.HandshakeFlags&protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE == 0 {
		t.Errorf("%+v", hello)
	}
	data := goData("disk", protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE, protocol.NEGOTIATION_TYPE_INFO_NAME)
	if err := binary.Write(p, binary.BigEndian, struct {
		Flags uint32
		protocol.NegotiationOptionHeader
	}{1, protocol.NegotiationOptionHeader{
		OptionMagic: protocol.NEGOTIATION_MAGIC_OPTION, ID: protocol.NEGOTIATION_ID_OPTION_GO, Length: uint32(len(data)),
	}}); err != nil {
		t.Fatal(err)
	}
	p.put(data)
	seen := 0
	for {
		var head protocol.NegotiationReplyHeader
		decode(&head)
		if head.ReplyMagic != protocol.NEGOTIATION_MAGIC_REPLY || head.ID != protocol.NEGOTIATION_ID_OPTION_GO {
			t.Fatalf("%+v", head)
		}
		if head.Type == protocol.NEGOTIATION_TYPE_REPLY_ACK {
			break
		}
		body := bytes.NewReader(p.get(int(head.Length)))
		switch kind := binary.BigEndian.Uint16([]byte{readByte(t, body), readByte(t, body)}); kind {
		case protocol.NEGOTIATION_TYPE_INFO_EXPORT:
			var info protocol.NegotiationReplyInfo
			rewind(t, body, &info)
			if info.Size != 1<<20 || info.TransmissionFlags&protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN == 0 {
				t.Errorf("%+v", info)
			}
			seen++
		case protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE:
			var info protocol.NegotiationReplyBlockSize
			rewind(t, body, &info)
			if info.MinimumBlockSize != 1 || info.PreferredBlockSize != 64<<10 || info.MaximumBlockSize != 32<<20 {
				t.Errorf("%+v", info)
			}
			seen++
		case protocol.NEGOTIATION_TYPE_INFO_NAME:
			seen++
		}
	}
	if seen != 3 {
		t.Errorf("%d kinds of information", seen)
	}
	if err := binary.Write(p, binary.BigEndian, protocol.TransmissionRequestHeader{
		RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, Type: protocol.TRANSMISSION_TYPE_REQUEST_WRITE, Handle: 42, Length: 4,
	}); err != nil {
		t.Fatal(err)
	}
	p.put("data")
	var reply protocol.TransmissionReplyHeader
	decode(&reply)
	if want := (protocol.TransmissionReplyHeader{ReplyMagic: protocol.TRANSMISSION_MAGIC_REPLY, Error: protocol.TRANSMISSION_ERROR_EPERM, Handle: 42}); reply != want {
		t.Errorf("%+v", reply)
	}
}

func readByte(t *testing.T, r *bytes.Reader) byte {
	t.Helper()
	b, err := r.ReadByte()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rewind decodes v from the beginning of r, all of it.
func rewind(t *testing.T, r *bytes.Reader, v any) {
	t.Helper()
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if err := binary.Read(r, binary.BigEndian, v); err != nil || r.Len() != 0 {
		t.Fatalf("%v, %d bytes left", err, r.Len())
	}
}
