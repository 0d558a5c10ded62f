#!/bin/busybox sh
# PID 1 of a source VM. It checks the files of former boots, and in mode
# "writer" adds new ones for ever.
#
# A file seq-NNNNNN begins with a line "seq NNNNNN MD5", followed by as much
# content as its number demands, whose checksum that is. It gets its name only
# after it is on the disk, so at whatever instant the disk is looked at, all
# files that have a name must be whole, and no number may be missing.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
# Some kernels have done it; without, there was no console to begin with.
[ -e /dev/null ] || mount -t devtmpfs dev /dev
exec < /dev/console > /dev/console 2>&1
mount -t tmpfs tmp /tmp
say() { echo "TIDEMARK-GUEST $*"; }

mode=show pause=100 load=0
for word in $(cat /proc/cmdline); do
  case $word in
    tidemark.mode=*) mode=${word#*=} ;;
    tidemark.pause=*) pause=${word#*=} ;;
    tidemark.load=*) load=${word#*=} ;;
  esac
done
say booted "$mode"

last=0 flaws=0
flaw() { flaws=$((flaws + 1)); [ $flaws -gt 100 ] || say "$@"; }
for f in /data/seq-[0-9][0-9][0-9][0-9][0-9][0-9]; do
  [ -f "$f" ] || continue
  n=$((1${f#/data/seq-} - 1000000))
  while last=$((last + 1)); [ $last -lt $n ]; do flaw missing $last; done
  {
    read -r tag num sum
    got=$(md5sum)
  } < "$f"
  [ "$tag $num $sum" = "seq ${f#/data/seq-} ${got%% *}" ] || flaw bad $n
done
say last $last
[ $flaws -ne 0 ] || say complete $last

if [ "$mode" != writer ]; then
  sync
  poweroff -f
fi

mount -o remount,rw,discard / || { say failed remount; poweroff -f; }
if [ "$load" = 1 ]; then
  # Rewrites blocks past the guest's cache without a moment's rest, so that the
  # disk is never quiet.
  dd if=/dev/urandom of=/data/load bs=4k count=256 conv=fsync 2> /dev/null
  (
    i=0
    while i=$((i + 37)); do
      dd if=/dev/urandom of=/data/load bs=4k count=1 seek=$((i % 256)) oflag=direct conv=notrunc 2> /dev/null
    done
  ) &
fi
n=$last scratch=0
rm -f /data/*.new
while :; do
  n=$((n + 1))
  name=$(printf '%06d' $n)
  # 4 to 256 KiB, most of them small, so that some minutes fit on a small disk.
  kib=$((4 << (n * 5 % 7)))
  awk -v n=$n -v k=$kib 'BEGIN {
    srand(n)
    for (i = k * 64; i > 0; i--) printf "%08x%08x", rand() * 2147483647, rand() * 2147483647
  }' > /tmp/body
  sum=$(md5sum < /tmp/body)
  { echo "seq $name ${sum%% *}"; cat /tmp/body; } > /data/$name.new &&
    sync /data/$name.new &&
    mv /data/$name.new /data/seq-$name &&
    sync /data || {
      # Numbered files have filled the disk; go on rewriting what is there.
      rm -f /data/$name.new
      n=$((n - 1))
      say full $n
      pause=1000
    }
  [ $n -lt $((1$name - 1000000)) ] || say wrote $n

  # Eight files that are rewritten in place, and now and then freed.
  scratch=$((scratch + 1))
  dd if=/dev/urandom of=/data/scratch-$((scratch % 8)) bs=4k count=$((scratch * 13 % 48 + 1)) conv=notrunc 2> /dev/null
  [ $((scratch % 5)) -ne 0 ] || rm -f /data/scratch-$((scratch * 3 % 8))
  [ "$pause" -eq 0 ] || usleep $((pause * 1000))
done
