#!/bin/busybox sh
# PID 1 of a throw-away kernel: loads modules, runs the programs of /run.list in
# order and tells how each ended.
/bin/busybox --install -s /bin
export PATH=/sbin:/bin HOME=/tmp TIDEMARK_TESTVM=1
# What device-mapper's tools need where no udev runs.
export DM_DISABLE_UDEV=1 LVM_SUPPRESS_FD_WARNINGS=1
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t tracefs trace /sys/kernel/tracing
mount -t debugfs debug /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
ip link set lo up
read -r token < /run.token
say() { echo "TIDEMARK-RUN $token $*"; }
while read -r module; do
  insmod $module || say insmod failed: $module
done < /modules.list
say kernel $(uname -r) up $(cut -d' ' -f1 /proc/uptime)
n=0
while read -r program; do
  n=$((n + 1))
  say start $n
  (cd /tmp && eval "$program") < /dev/null
  say exit $n $?
done < /run.list
say done $n
sync
poweroff -f
