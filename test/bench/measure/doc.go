// Package measure holds what the benchmarks share: samples and their ratios, and
// what the machine was and did meanwhile. It judges nothing.
package measure
