#!/bin/busybox sh
# PID 1 of the small Linux guest: a little of everything that makes VM-exits, then power-off.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo "kvmtrace-guest: $(uname -r) on $(nproc) vCPUs"
# IPIs and scheduling, idling and wake-ups, page faults, port I/O
for i in 1 2 3; do (: | cat | cat >/dev/null) & done
wait
sleep 0.1
dd if=/dev/zero of=/tmp/block bs=64k count=64 2>/dev/null
echo "kvmtrace-guest: done"
poweroff -f
