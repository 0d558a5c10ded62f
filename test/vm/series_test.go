package testvm

import "testing"

func TestOfSeries(t *testing.T) {
	have := []string{
		"linux-image-amd64", "linux-image-6.12-cloud-amd64", "linux-image-6.18.9+deb13-cloud-amd64", "linux-image-6.18.15+deb13-cloud-amd64",
		"linux-image-6.18.15+deb13-cloud-amd64-unsigned", "linux-image-6.18.16+deb13-amd64", "linux-image-6.18.17+deb13-rt-amd64", "linux-image-6.1.99+deb13-cloud-amd64",
	}
	for name, want := range map[string]string{
		"linux-image-6.18-cloud-amd64":         "linux-image-6.18.15+deb13-cloud-amd64", // 15 is more than 9
		"linux-image-6.18-amd64":               "linux-image-6.18.16+deb13-amd64",
		"linux-image-6.12-cloud-amd64":         "linux-image-6.12-cloud-amd64", // a package of that name
		"linux-image-amd64":                    "linux-image-amd64",
		"linux-image-6.18.9+deb13-cloud-amd64": "linux-image-6.18.9+deb13-cloud-amd64",
		"linux-image-7.0-cloud-amd64":          "",
	} {
		got, err := ofSeries(name, have)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}
