package s3

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/tidemark/tidemark/store/blob"
)

// ErrLocation is wrapped when a location can't be understood.
var ErrLocation = errors.New("invalid S3 location")

// Style says where a request names the bucket.
type Style string

// Styles. The zero value is PathStyle where the endpoint is given, also by the
// environment, and VirtualStyle at AWS.
const (
	PathStyle    Style = "path"    // https://host/bucket/key
	VirtualStyle Style = "virtual" // https://bucket.host/key
)

// Location says where objects lie and how to get there. Credentials are no part
// of it: they come from the environment or the files of the AWS tools.
type Location struct {
	Endpoint string // such as "https://host:9000"; empty: AWS, or what the environment says
	Bucket   string
	Prefix   string // without slashes at its ends; may be empty
	Region   string // empty: what the environment says, else us-east-1
	Profile  string // of the files of the AWS tools; empty: what the environment says
	CAFile   string // PEM certificates to trust in place of the system's; empty: what the environment says
	Style    Style
}

// Parse reads what follows "s3:" in a repository's location:
//
//	bucket/prefix?options
//	https://host:port/bucket/prefix?options
//
// The prefix may be left out. Options are region, profile, ca-file (the path of a
// file) and style (path or virtual). The error wraps ErrLocation.
func Parse(s string) (Location, error) {
	l, err := parse(s)
	if err != nil {
		return Location{}, fmt.Errorf("%w: %w", ErrLocation, err)
	}
	return l, nil
}

func parse(s string) (l Location, err error) {
	rest, query, _ := strings.Cut(s, "?")
	if strings.HasPrefix(rest, "//") {
		return l, fmt.Errorf("begin it with the bucket (s3:%s) or with https:// (s3:https:%s)", strings.TrimLeft(rest, "/"), rest)
	}
	if strings.ContainsAny(rest, "#%\\") {
		return l, errors.New("it has a character that no bucket or prefix may have")
	}
	for _, scheme := range []string{"https://", "http://"} {
		after, ok := strings.CutPrefix(rest, scheme)
		if !ok {
			continue
		}
		host, path, _ := strings.Cut(after, "/")
		if strings.Contains(host, "@") {
			return l, errors.New("credentials don't belong there: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
		}
		u, err := url.Parse(scheme + host)
		if err != nil || u.Hostname() == "" || u.Host != host || strings.HasSuffix(host, ":") {
			return l, fmt.Errorf("no host: %q", host)
		}
		l.Endpoint, rest = scheme+host, path
		break
	}
	l.Bucket, l.Prefix, _ = strings.Cut(rest, "/")
	l.Prefix = strings.TrimSuffix(l.Prefix, "/")
	if !validBucket(l.Bucket) {
		return l, fmt.Errorf("no bucket's name: %q", l.Bucket)
	}
	// Names of objects follow it: 1024 bytes in all, at most.
	if l.Prefix != "" && (!blob.ValidName(l.Prefix) || len(l.Prefix) > 512) {
		return l, fmt.Errorf("no prefix for objects: %q", l.Prefix)
	}
	return l, l.options(query)
}

func (l *Location) options(query string) error {
	q, err := url.ParseQuery(query)
	if err != nil {
		return fmt.Errorf("options: %w", err)
	}
	to := map[string]*string{"region": &l.Region, "profile": &l.Profile, "ca-file": &l.CAFile, "style": (*string)(&l.Style)}
	for name, values := range q {
		p := to[name]
		if p == nil || len(values) != 1 || values[0] == "" {
			return fmt.Errorf("options are region, profile, ca-file and style, each once; not %q", name)
		}
		*p = values[0]
	}
	switch l.Style {
	case "", PathStyle, VirtualStyle:
		return nil
	}
	return fmt.Errorf("style is %s or %s, not %q", PathStyle, VirtualStyle, l.Style)
}

// String returns what Parse reads.
func (l Location) String() string {
	s := l.Bucket
	if l.Endpoint != "" {
		s = l.Endpoint + "/" + s
	}
	if l.Prefix != "" {
		s += "/" + l.Prefix
	}
	q := url.Values{}
	for name, v := range map[string]string{"region": l.Region, "profile": l.Profile, "ca-file": l.CAFile, "style": string(l.Style)} {
		if v != "" {
			q.Set(name, v)
		}
	}
	if len(q) > 0 {
		s += "?" + q.Encode()
	}
	return s
}

// validBucket: what AWS allows, and what others do besides: capitals and underscores.
func validBucket(s string) bool {
	if len(s) < 3 || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case (c == '-' || c == '.' || c == '_') && i > 0 && i < len(s)-1:
		default:
			return false
		}
	}
	return !strings.Contains(s, "..")
}
