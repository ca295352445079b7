# What a lab host runs: it swaps kvm's modules and records, one after the other. Lines "load ..." and "one ..." follow.
loaded=none

# of MODULE PARAMETERS: those of the parameters that are the module's, without its name
of() {
    module=$1
    shift
    for one in "$@"; do
        case $one in $module.*) echo ${one#*.} ;; esac
    done
}

# load DIRECTORY VENDOR PARAMETERS: a fault that keeps the modules busy ends this boot
load() {
    [ "$loaded" = "$*" ] && return
    here=$1 vendor=$2
    loaded=$*
    shift 2
    for name in $(echo $vendor | tr - _) kvm; do
        for again in 1 2 3; do ./busybox rmmod $name 2>>swap.log && break; sleep 1; done
        [ -d /sys/module/$name ] && { echo "$name stays loaded" >>swap.log; exit 0; }
    done
    ./busybox insmod $here/kvm.ko $(of kvm "$@") 2>>swap.log &&
        ./busybox insmod $here/$vendor.ko $(of kvm_amd "$@") $(of kvm_intel "$@") 2>>swap.log ||
        { echo "$here: not loaded" >>swap.log; exit 0; }
}

# probe NAME: switches on what NAME.probes lists, in a trace instance of its own
tracing=/sys/kernel/tracing instance=$tracing/instances/history
[ -d $tracing/instances ] || ./busybox mount -t tracefs tracefs $tracing
probe() {
    [ -f $1.probes ] || return 0
    while read -r line; do
        case $line in [pr]:*) echo "$line" >>$tracing/kprobe_events || echo "$1: $line refused" >>swap.log ;; esac
    done <$1.probes
    mkdir $instance
    while read -r line; do
        event=$(echo "${line%% *}" | tr : /)
        case $line in [pr]:*) event=${event#*/} ;; esac
        echo 1 >$instance/events/$event/enable || echo "$1: $event not enabled" >>swap.log
    done <$1.probes
}

# probed NAME: keeps what they told, and takes them away
probed() {
    [ -f $1.probes ] || return 0
    grep -v '^#' $instance/trace >$1.probed
    rmdir $instance
    echo >$tracing/kprobe_events
}

# one NAME ARGUMENTS: a recording
one() {
    name=$1
    shift
    dmesg -c >/dev/null
    probe $name
    timeout -k 3 $limit_s kvmtrace record --backend ftrace --events all --max-size $max_size -o $name.dat "$@" \
        >$name.log 2>&1
    echo $? >$name.status
    probed $name
    dmesg -c >$name.dmesg
}
