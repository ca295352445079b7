#!/bin/busybox sh
# PID 1 of a lab host: reach the root file system, load KVM, run the job, power off.
# Lines "kvmtrace-lab: ..." on the console are read by kvmtrace/lab/emulator.py.
export PATH=/bin
/bin/busybox mkdir -p /ro /rw /job /new
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

# through the kernel log: the serial console prints it at once and whole
say() { echo "<1>kvmtrace-lab: $*" >/dev/kmsg; }
halt_lab() { sync; poweroff -f; sleep 60; }
die() { say "failed $*"; halt_lab; }

# the value of NAME=VALUE on the kernel command line
parameter() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1=//p" | tail -n 1; }

# load_modules PHASE: the initramfs's modules, unless the job brings a replacement; parameters as NAME.KEY=VALUE
load_modules() {
    for name in $(cat /modules/$1.list); do
        file=/modules/$name.ko
        [ -e /job/modules/$name.ko ] && file=/job/modules/$name.ko
        settings=
        case " $(cat /proc/cmdline)" in
        *" ${name%-*}"*) settings=$(tr ' ' '\n' </proc/cmdline | sed -n "s/^$(echo $name | tr - _)\.//p" | tr '\n' ' ') ;;
        esac
        insmod $file $settings 2>/tmp/why || die "module $name: $(cat /tmp/why)"
    done
}

# 9p and disks may appear a moment after their driver
try_mount() {
    for wait in 0 1 1 2 4; do
        sleep $wait
        mount "$@" 2>/tmp/why && return
    done
    die "mount $*: $(cat /tmp/why)"
}

# the disk at a SCSI address: names like sda are given in the order of probing, which varies
find_disk() {
    for wait in 0 1 1 2 4 8; do
        sleep $wait
        for name in /sys/class/scsi_device/$1/device/block/*; do
            [ -b "/dev/${name##*/}" ] && echo "/dev/${name##*/}" && return
        done
    done
    echo /dev/missing
}

load_modules root
isa=$(parameter lab.isa)
if [ "$isa" != vmx ]; then
    nine=trans=virtio,version=9p2000.L,msize=512000
    try_mount -t 9p -o ro,cache=loose,$nine root /ro
    try_mount -t 9p -o cache=none,$nine job /job
    exec_out=/job/stdout exec_err=/job/stderr results=/job/out.tar
else
    try_mount -t ext4 -o ro,noload $(find_disk 0:0:0:0) /ro
    mount -t tmpfs -o size=75% job /job
    tar -x -f $(find_disk 0:0:1:0) -C /job && [ -d /job/lower ] || die "the job disk holds no job"
    exec_out=/dev/ttyS1 exec_err=/dev/ttyS2 results=$(find_disk 1:0:1:0)
    for port in $exec_out $exec_err; do stty -F $port 115200 raw -echo; done
fi
mount -t tmpfs -o size=75% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/job/lower:/ro,upperdir=/rw/upper,workdir=/rw/work root /new || die "overlay"
load_modules kvm
[ -c /dev/kvm ] || die "no /dev/kvm after loading KVM"

mkdir -p /new/proc /new/sys /new/dev /new/usr/src /new/lib/modules
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t tracefs tracefs /new/sys/kernel/tracing
mount -t debugfs debugfs /new/sys/kernel/debug
mount -t bpf bpf /new/sys/fs/bpf
# what runs on the machine below is none of this host's business (locks, process ids, spools of recorders)
case $(cat /job/cwd) in
/run/*) ;;
*) mount -t tmpfs run /new/run ;;
esac
# the kernel's packages, where bcc and modprobe look for them
kernel=$(parameter lab.kernel_root)
if [ -n "$kernel" ]; then
    mount --bind /ro$kernel/lib/modules /new/lib/modules
    [ -d /ro$kernel/usr/src ] && mount --bind /ro$kernel/usr/src /new/usr/src
fi
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr
ip link set lo up
hostname kvmtrace-lab-$isa
echo 1 >/proc/sys/kernel/sysrq

# Brings each file out when it has not changed for two looks, for the case that this host panics before its end.
bring_out() {
    before=
    while sleep 2; do
        now=$(cd "/rw/upper$cwd" 2>/dev/null && find . -type f ! -path '*/.*.kvmtrace-*' -exec stat -c '%Y %s %n' {} +)
        echo "$now" | while read -r changed size name; do
            case "$before" in *"$changed $size $name"*) ;; *) continue ;; esac
            [ "/job/files/$name" -nt "/rw/upper$cwd/$name" ] && continue
            mkdir -p "/job/files/${name%/*}"
            cp "/rw/upper$cwd/$name" /job/part && mv /job/part "/job/files/$name"
        done
        before=$now
    done
}

# The same onto the results' disk (results_disk.py): two slots by turns, the block that says which turn it was last.
bring_to_disk() {
    before= written= turn=0
    while sleep 4; do
        now=$(cd "/rw/upper$cwd" 2>/dev/null && find . -type f ! -path '*/.*.kvmtrace-*' -exec stat -c '%Y %s %n' {} +)
        same=$(echo "$now" | while read -r changed size name; do
            case "$before" in *"$changed $size $name"*) echo "$changed $size $name" ;; esac
        done)
        before=$now
        [ -n "$same" ] && [ "$same" != "$written" ] || continue
        bytes=$(echo "$same" | { sum=0; while read -r changed size name; do sum=$((sum + size + 1536)); done; echo $sum; })
        [ $bytes -lt 120000000 ] || continue # a slot has 128 MiB
        turn=$((turn + 1))
        slot=$((524288 + turn % 2 * 262144)) # in blocks of 512 bytes
        dd if=/dev/zero of=$results bs=512 count=1 seek=$slot conv=notrunc
        (
            IFS='
'
            set -f # names stand alone on their lines and are no patterns
            tar -c -C "/rw/upper$cwd" $(echo "$same" | cut -d ' ' -f 3-)
        ) | dd of=$results bs=512 seek=$((slot + 1)) conv=notrunc
        sync
        echo "kvmtrace-files $turn" | dd of=$results bs=512 seek=$slot conv=notrunc,sync
        sync
        written=$same
    done
}
cwd=$(cat /job/cwd)
keeper=
if [ -e /job/want-files ]; then
    if [ "$isa" = vmx ]; then bring_to_disk 2>/dev/null & else bring_out 2>/dev/null & fi
    keeper=$!
fi

say "started"
env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    chroot /new /bin/sh /.kvmtrace-lab/command </dev/null >>$exec_out 2>>$exec_err
status=$?
say "ended $status"

[ -n "$keeper" ] && kill $keeper
# what the command made or changed below its directory: the overlay's upper layer (deletions are devices there)
if [ -e /job/want-files ] && [ -d "/rw/upper$cwd" ]; then
    tar -c -f $results -C "/rw/upper$cwd" . 2>/tmp/why || die "bringing files back: $(tail -n 1 /tmp/why)"
fi
sync
say "exit $status"
halt_lab
