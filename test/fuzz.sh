#!/bin/sh
# fuzz.sh TIME: runs every fuzz target of the tree for TIME, one after the other. Making inputs smaller is kept
# short: by default it takes a minute for each that is new, in which nothing else is tried.
set -eu
time=${1:-30s}
rc=0
grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' . | xargs -n1 dirname | sort -u | while read -r dir; do
  grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$dir"/*_test.go | sed 's/^func //' | sort -u | while read -r target; do
    echo "== $dir $target"
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 100x "$dir"
  done || exit 1
done || rc=1
exit $rc
