package s3

import (
	"errors"
	"testing"
)

func TestParse(t *testing.T) {
	for s, want := range map[string]Location{
		"bucket":                             {Bucket: "bucket"},
		"bucket/":                            {Bucket: "bucket"},
		"bucket/a/b/":                        {Bucket: "bucket", Prefix: "a/b"},
		"https://h/bucket":                   {Endpoint: "https://h", Bucket: "bucket"},
		"http://127.0.0.1:9000/bucket/x":     {Endpoint: "http://127.0.0.1:9000", Bucket: "bucket", Prefix: "x"},
		"https://[::1]:9000/bucket/x":        {Endpoint: "https://[::1]:9000", Bucket: "bucket", Prefix: "x"},
		"bucket/x?region=eu-1&style=virtual": {Bucket: "bucket", Prefix: "x", Region: "eu-1", Style: VirtualStyle},
		"https://h/bucket?ca-file=/etc/ca.pem&profile=backup&style=path": {
			Endpoint: "https://h", Bucket: "bucket", CAFile: "/etc/ca.pem", Profile: "backup", Style: PathStyle,
		},
	} {
		got, err := Parse(s)
		if err != nil || got != want {
			t.Errorf("Parse(%q) = %+v, %v; want %+v", s, got, err, want)
		}
		again, err := Parse(got.String())
		if err != nil || again != got {
			t.Errorf("%q: printed as %q: %+v, %v", s, got, again, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, s := range []string{
		"", "/", "b", "//bucket/x", "https://", "https:///bucket", "https://h", "https://h/", "https://h:/bucket",
		"https://key:secret@h/bucket", "https://h:port/bucket", "bucket//x", "bucket/../x", "bucket/.x", "bucket/x y",
		"bucket/x#y", "bucket/%2e%2e/x", "-bucket", "bu..ket", "bucket?regoin=x", "bucket?region=", "bucket?region=a&region=b",
		"bucket?style=dns", "bucket?%zz", "ftp://h/bucket", "https://h\\@evil/bucket",
	} {
		if l, err := Parse(s); !errors.Is(err, ErrLocation) {
			t.Errorf("Parse(%q) = %+v, %v", s, l, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"bucket/a", "https://h:1/bucket/p?region=x", "http://[::1%25lo]/bucket", "bucket?style=path&ca-file=%2Fx", "//b/c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := Parse(s)
		if err != nil {
			if !errors.Is(err, ErrLocation) || l != (Location{}) {
				t.Fatalf("%+v, %v", l, err)
			}
			return
		}
		if !validBucket(l.Bucket) {
			t.Fatalf("bucket %q", l.Bucket)
		}
		again, err := Parse(l.String())
		if err != nil || again != l {
			t.Fatalf("%q: %+v printed as %q: %+v, %v", s, l, l, again, err)
		}
	})
}
