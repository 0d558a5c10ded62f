#!/bin/sh
# deps.sh build|run|model|bench...: installs the Debian packages that building the BPF object and
# linting (build), the tests and the demo (run), the models of protocols (model), or the
# benchmarks' competitors (bench) need. Does nothing where all are there; says what is missing
# where it may not install.
set -eu

want=
for what in "$@"; do
  case $what in
    build) want="$want clang-14 llvm-14 libbpf-dev gcc libc6-dev git" ;;
    run) want="$want qemu-system-x86 qemu-utils nbdkit libnbd-bin python3-libnbd nbd-client openssl fio fuse3 busybox-static cpio kmod xz-utils dmsetup mdadm nvme-cli procps fdisk util-linux mount e2fsprogs xfsprogs btrfs-progs ntfs-3g dosfstools mtools attr acl" ;;
    model) want="$want spin gcc libc6-dev" ;;
    bench) want="$want restic borgbackup python3-pyfuse3" ;;
    *) echo "usage: $0 build|run|model|bench..." >&2; exit 2 ;;
  esac
done

missing=
for p in $want; do
  dpkg-query -W -f '${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing="$missing $p"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
  echo "$0: not root; install these yourself: apt-get install$missing" >&2
  exit 0
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing > /dev/null
