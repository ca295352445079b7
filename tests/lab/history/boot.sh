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

# one NAME ARGUMENTS: a recording
one() {
    name=$1
    shift
    dmesg -c >/dev/null
    timeout -k 3 $limit_s kvmtrace record --backend ftrace --events all --max-size $max_size -o $name.dat "$@" \
        >$name.log 2>&1
    echo $? >$name.status
    dmesg -c >$name.dmesg
}
