"""The rows of statistics: what each accumulator returns, and the report document holds as it is.

Times are integers in ns where the name says so, absent is None (never 0), unknown codes keep their number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field

from kvmtrace.lazy_dataclass import dataclass


@dataclass(frozen=True)
class ExitRow:
    """All VM-exits of one reason; times are from kvm_exit to the thread's next kvm_entry."""

    isa: str | None
    exit_reason: int
    name: str
    count: int  # kvm_exit events
    samples: int  # completed exit→entry pairs; the times below are theirs
    total_ns: int | None
    min_ns: int | None
    max_ns: int | None
    mean_ns: int | None
    rel_stderr: float | None  # percent of the mean, as perf prints it
    p50_ns: int | None
    p90_ns: int | None
    p99_ns: int | None
    p999_ns: int | None
    to_userspace: int | None  # exits that left to userspace; null if kvm_userspace_exit was not recorded
    guest_before_ns: int | None  # guest mode that ended with an exit of this reason
    kernel_ns: int | None  # of total_ns: in the kernel, entry and exit path included
    userspace_ns: int | None  # of total_ns: in the VMM
    waiting_ns: int | None  # of total_ns: blocked or halt-polling; null: not recorded
    preempted_ns: int | None  # of total_ns: switched out, runnable; null: not recorded
    unknown_ns: int | None  # of total_ns: not attributable
    histogram: tuple[int, ...]  # samples by powers of two: [k] counts 2**k .. 2**(k+1)-1 ns
    fine_histogram: tuple[tuple[int, int], ...] = ()  # [least ns, samples] of each eighth of an octave that has any


@dataclass(frozen=True)
class PerfRow:
    """One line of a `perf kvm stat report` table."""

    key: str
    samples: int
    total_ns: int
    min_ns: int
    max_ns: int
    mean_ns: int
    rel_stderr: float  # percent of the mean
    exit_reason: int | None = None
    isa: str | None = None


@dataclass(frozen=True)
class PerfTables:
    """`perf kvm stat report --event=vmexit|mmio|ioport|msr`."""

    vmexit: tuple[PerfRow, ...] = ()
    mmio: tuple[PerfRow, ...] = ()
    ioport: tuple[PerfRow, ...] = ()
    msr: tuple[PerfRow, ...] = ()


@dataclass(frozen=True)
class UserspaceExitRow:
    """All returns of KVM_RUN for one reason; times are from the return to the thread's next KVM_RUN."""

    reason: int
    name: str
    errno: int | None  # 0, or negative: then KVM leaves the reason as it was; null: the recording does not tell it
    count: int
    samples: int
    total_ns: int | None
    min_ns: int | None
    max_ns: int | None
    mean_ns: int | None
    p50_ns: int | None
    p90_ns: int | None
    p99_ns: int | None
    p999_ns: int | None
    histogram: tuple[int, ...] = ()
    fine_histogram: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Budget:
    """Where a vCPU thread's wall time went; null: this capture cannot tell, the time is in another part."""

    guest_ns: int | None  # between VM-entry and VM-exit
    entry_exit_ns: int | None  # in the ISA's run function around guest mode (needs the probes)
    handler_ns: int  # in the kernel on the CPU: exit handling, KVM_RUN's own work
    userspace_ns: int | None  # outside KVM_RUN, the VMM's other system calls included
    blocked_ns: int | None  # switched out, sleeping (HLT, or the VMM waits)
    halt_poll_ns: int | None  # busy waiting in the kernel after HLT
    preempted_ns: int | None  # switched out, runnable
    unknown_ns: int  # may hide lost events, or before the first step that tells

    def total_ns(self) -> int:
        """Return the sum of the parts: the wall time."""
        return sum(value or 0 for value in dataclasses.astuple(self))


@dataclass(frozen=True)
class VcpuRow:
    """A thread that ran a vCPU."""

    tid: int
    pid: int | None
    comm: str | None
    vcpu_id: int | None
    wall_ns: int  # from the thread's first KVM event to its last event
    budget: Budget
    migrations: int
    exits: int
    userspace_exits: int
    cpus: tuple[int, ...]  # host CPUs it was seen on
    vm: str | None = None  # name of its VM; null: the recorder did not note one


@dataclass(frozen=True)
class VmRow:
    """A process that has a VM: who it is, as the recorder noted, and what its vCPUs did together."""

    pid: int | None  # null: of vCPU threads whose process is not known
    name: str | None
    uuid: str | None
    kind: str | None  # "qemu" "cloud-hypervisor" "firecracker" "crosvm" "kvmtool" "kvmtrace"; null: not known
    name_from: str | None  # "command line" "qmp" "cgroup" "socket"
    unit: str | None  # systemd scope or service of the process
    pod: str | None  # uid of its Kubernetes pod
    namespace: str | None  # of the pod, where the VM's name tells it (KubeVirt)
    container: str | None  # id of its container, 12 digits
    comm: str | None  # name of the process
    debugfs: tuple[str, ...]  # its folders under /sys/kernel/debug/kvm, PID-FD
    tids: tuple[int, ...]  # its vCPU threads in this recording
    exits: int
    userspace_exits: int
    wall_ns: int  # sum over its vCPUs
    budget: Budget | None  # sum over its vCPUs; null: none was seen


@dataclass(frozen=True)
class NestedExitRow:
    """VM-exits of L2 of one reason; times are from L2's exit to its next VM-entry, with all that L1 does between."""

    isa: str | None
    exit_reason: int
    name: str
    reflected: bool  # L1 got an exit for it; else KVM (L0) handled it
    count: int
    samples: int  # those after which L2 was seen to go on; what follows is theirs
    l1_exits: int | None  # VM-exits that L1 took itself meanwhile
    total_ns: int | None
    max_ns: int | None
    l0_ns: int | None  # of total_ns: in KVM, entry and exit path included
    l1_guest_ns: int | None  # of total_ns: L1 ran
    userspace_ns: int | None  # of total_ns: in the VMM
    waiting_ns: int | None  # of total_ns: blocked or halt-polling
    preempted_ns: int | None  # of total_ns: switched out, runnable
    unknown_ns: int | None  # of total_ns: not attributable


@dataclass(frozen=True)
class ReflectedWorkRow:
    """VM-exits of one reason that L1 took while its guest waited for it."""

    isa: str | None
    exit_reason: int
    name: str
    count: int
    total_ns: int  # from kvm_exit to the next kvm_entry: KVM's part of them


@dataclass(frozen=True)
class NestedBudget:
    """A vCPU's wall time by who had it; null: this capture cannot tell, the time is in another part."""

    l2_guest_ns: int
    l1_guest_ns: int
    l0_ns: int  # in KVM and the host's kernel, on the CPU
    userspace_ns: int | None
    waiting_ns: int | None  # blocked or halt-polling
    preempted_ns: int | None
    unknown_ns: int


@dataclass(frozen=True)
class NestedVcpu:
    """A vCPU whose guest (L1) is a hypervisor with a guest (L2); what L2 runs in turn counts as L2."""

    tid: int
    vcpu_id: int | None
    entries: int  # into L2
    failed_entries: int  # that did not get there
    l1_exits: int  # VM-exits of L1, those before it had a guest included
    l2_exits: int
    reflected: int  # of l2_exits: L1 got them
    wall_ns: int
    budget: NestedBudget
    exits: tuple[NestedExitRow, ...]
    l1_work: tuple[ReflectedWorkRow, ...]  # what L1 did about reflected exits, as far as it left guest mode for it


@dataclass(frozen=True)
class StolenRow:
    """Who had the CPU while the vCPUs of a VM waited for one: preempted, or woken and not on a CPU yet."""

    pid: int | None  # of the VM that waited
    vm: str | None  # its name
    kind: str  # "vcpu" (of another VM) "own vcpu" "vmm" "vhost" "kernel" "process" "idle" "unknown" (not recorded)
    who: str  # VM, thread or process that ran
    by_pid: int | None  # process of the VM that ran; null where none did
    total_ns: int
    count: int  # stretches
    longest_ns: int


@dataclass(frozen=True)
class WakeUpRow:
    """How long an interrupt took from its acceptance to the entry of a vCPU that slept."""

    pid: int | None
    vm: str | None
    count: int
    total_ns: int
    p50_ns: int
    p99_ns: int
    max_ns: int
    to_cpu_ns: int  # of total_ns: until the vCPU was on a CPU


@dataclass(frozen=True)
class TriggerRow:
    """Why the flight recorder saved this recording; the first is the one that made it."""

    kind: str  # "slower-than" "rate" "run-delay" "slo" "signal" "command" "model" "monitor"
    trigger: str  # as it was asked for
    ts_ns: int  # on the recording's clock
    pid: int | None
    tid: int | None
    vcpu_id: int | None
    vm: str | None
    reason: str | None  # exit reason or userspace exit, as KVM prints it
    dur_ns: int | None  # of what took so long, waiting and being preempted left out
    value: float | None  # what was measured: exits per second, or a quantile in ns
    detail: str | None  # what a command or the monitor said
    number: int | None = None  # of the VM-exit it is about, as `--explain` takes it; null: not one, or not recorded


@dataclass(frozen=True)
class PortRow:
    """Accesses to one I/O port."""

    port: int
    name: str
    direction: str  # "in" "out"
    count: int
    total_ns: int | None  # of the VM-exits that these accesses belong to; null if none is known


@dataclass(frozen=True)
class GpaRow:
    """Accesses to one guest-physical address (MMIO) or faults on one guest page."""

    gpa: int
    kind: str  # "mmio read" "mmio write" "fast mmio" "page fault" (gpa is the page's address)
    count: int
    total_ns: int | None


@dataclass(frozen=True)
class MsrRow:
    """Accesses to one MSR."""

    msr: int
    name: str
    direction: str  # "read" "write"
    count: int
    faults: int  # of these, ended in #GP
    total_ns: int | None


@dataclass(frozen=True)
class CrRow:
    """Accesses to one control register."""

    cr: int
    direction: str
    count: int
    total_ns: int | None


@dataclass(frozen=True)
class SysregRow:
    """Accesses to one trapped system register (arm64)."""

    register: int  # as sys_reg() of arch/arm64/include/asm/sysreg.h
    name: str
    direction: str  # "read" "write"
    count: int
    total_ns: int | None


@dataclass(frozen=True)
class HypercallRow:
    """Hypercalls of one number."""

    interface: str  # "kvm" "hyper-v" "xen" "smccc" (arm64: PSCI and other functions of its calling convention)
    nr: int
    name: str
    count: int
    total_ns: int | None


@dataclass(frozen=True)
class InterruptRow:
    """Injections of one vector."""

    vector: int
    kind: str  # "irq" "soft" "exception"
    name: str
    count: int
    reinjected: int | None


@dataclass(frozen=True)
class RipRow:
    """VM-exits of one reason at one guest instruction."""

    rip: int | None  # null: the recording does not tell it
    symbol: str | None
    isa: str | None
    exit_reason: int
    name: str
    count: int
    total_ns: int | None


@dataclass(frozen=True)
class EmulatedRow:
    """Instructions that KVM emulated."""

    insn: str  # bytes, hexadecimal
    mode: str  # "16" "32" "64": bits of the code segment; "?": the recording does not tell them
    text: str  # disassembled, "?" where that depends on a mode that is not told
    count: int
    failed: int


@dataclass(frozen=True)
class CpuRow:
    """VM-exits by the host CPU that they were recorded on."""

    cpu: int
    exits: int


@dataclass(frozen=True)
class LeftOut:
    """The rows that a list was cut by, in one."""

    rows: int
    count: int  # sum over them
    total_ns: int | None  # null: none of them has a time


@dataclass(frozen=True)
class Detail:
    """What the exits were about; each list is by time, then count, descending, and cut to the most expensive rows."""

    ports: tuple[PortRow, ...] = ()
    gpas: tuple[GpaRow, ...] = ()
    msrs: tuple[MsrRow, ...] = ()
    crs: tuple[CrRow, ...] = ()
    sysregs: tuple[SysregRow, ...] = ()
    hypercalls: tuple[HypercallRow, ...] = ()
    interrupts: tuple[InterruptRow, ...] = ()
    rips: tuple[RipRow, ...] = ()
    emulated: tuple[EmulatedRow, ...] = ()
    cpus: tuple[CpuRow, ...] = ()
    distinct: dict[str, int] = field(default_factory=dict)  # list -> rows before it was cut
    left_out: dict[str, LeftOut] = field(default_factory=dict)  # list -> what it was cut by; none for whole lists


@dataclass(frozen=True)
class SlowExit:
    """One of the VM-exits that took the longest, waiting and being preempted left out."""

    number: int  # of the VM-exit in its thread, from 1: what `--explain` takes, with --tid or --vcpu
    tid: int
    vcpu_id: int | None
    ts_ns: int
    isa: str | None
    exit_reason: int
    name: str
    dur_ns: int  # to the thread's next kvm_entry
    waiting_ns: int | None  # of dur_ns: blocked or halt-polling; null: not recorded
    preempted_ns: int | None  # of dur_ns: switched out, runnable; null: not recorded
    guest_rip: int | None
    access: str | None  # its first access: "port" "mmio" "page" "msr" "cr" "sysreg" "hypercall" "smccc"; null: none
    access_key: int | None  # the port, address, MSR, register or number accessed
    access_write: bool | None  # null: neither a read nor a write
    vm: str | None = None  # name of its VM; null: the recorder did not note one


@dataclass(frozen=True)
class Rate:
    """VM-exits over time."""

    bin_ns: int
    start_ns: int
    exits: tuple[int, ...]  # per bin
    userspace_exits: tuple[int, ...]
