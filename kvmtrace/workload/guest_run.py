"""Run a bundled guest from its first ioctl to its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError, KvmtraceError, UsageError
from kvmtrace.workload import abi
from kvmtrace.workload.guests import RAM_BYTES
from kvmtrace.workload.host_isa import guess_isa
from kvmtrace.workload.machines import find_guest, machine_of
from kvmtrace.workload.result import GuestRun
from kvmtrace.workload.vmm import VcpuThread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtrace.workload.guests import Guest
    from kvmtrace.workload.machines import Machine
    from kvmtrace.workload.vmm import Vcpu

DEFAULT_TIMEOUT_S = 300.0
# --slow-reason NAME -> KVM_EXIT_*
SLOW_REASONS: dict[str, int] = {"io": abi.EXIT_IO, "mmio": abi.EXIT_MMIO, "hlt": abi.EXIT_HLT}
_KICK = signal.SIGUSR1


def complete_arguments(guest: Guest, given: dict[str, int] | None) -> dict[str, int]:
    """Return every argument of the guest, defaults filled in.

    Raises
    ------
    UsageError
        An unknown argument, or a value out of range.
    """
    given = dict(given or {})
    complete = {}
    for argument in guest.arguments:
        value = given.pop(argument.name, argument.default)
        if not 1 <= value <= argument.maximum:
            limits = f"1..{argument.maximum}, not {value}"
            raise UsageError(f"{argument.name} of guest {guest.name} must be {limits}")
        complete[argument.name] = value
    if given:
        raise UsageError(f"guest {guest.name} has no argument {min(given)}")
    return complete


def runnable_guest(name: str, isa: str | None) -> Guest:
    """Return a guest as it is on an ISA.

    Raises
    ------
    UsageError
        There is no such guest.
    CapabilityError
        That ISA's KVM cannot run it.
    """
    guest = find_guest(name).on(isa)
    if isa in guest.refused:
        raise CapabilityError(f"guest {name} cannot run on {isa}: {guest.refused[isa]}", "use `kvmtrace lab run`")
    return guest


def run_guest(
    name: str,
    arguments: dict[str, int] | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    slow_ns: dict[str, int] | None = None,
) -> GuestRun:
    """Run a bundled guest to its end.

    Parameters
    ----------
    name : str, of a guest of this machine
    arguments : argument name -> value; defaults for those not given
    timeout_s : seconds after which the guest is stopped (only from a process's main thread)
    slow_ns : "io" "mmio" "hlt" -> ns to wait before serving each such userspace exit

    Returns
    -------
    GuestRun; `succeeded` is False if the guest did not end as it should

    Raises
    ------
    UsageError
        No such guest, argument or reason.
    CapabilityError
        No usable /dev/kvm, or this host's KVM cannot run this guest.
    """
    isa = guess_isa()
    guest = runnable_guest(name, isa)
    complete = complete_arguments(guest, arguments)
    slow = {reason: delay_ns for reason, delay_ns in (slow_ns or {}).items() if delay_ns > 0}
    if unknown := set(slow) - set(SLOW_REASONS):
        raise UsageError(f"cannot slow {min(unknown)}; there are {', '.join(SLOW_REASONS)}")
    start_ns = time.monotonic_ns()
    threads = _run_vm(
        machine_of(isa), guest, complete, {SLOW_REASONS[reason]: ns for reason, ns in slow.items()}, timeout_s
    )
    observed: Counter[str] = sum((thread.observed for thread in threads), Counter())
    failed = [thread.ended for thread in threads if thread.ended != guest.ends]
    return GuestRun(
        guest=name,
        arguments=complete,
        isa=isa,
        pid=os.getpid(),
        vcpu_tids={thread.vcpu.vcpu_id: thread.native_id or -1 for thread in threads},
        ended=failed[0] if failed else guest.ends,
        status=threads[0].vcpu.devices.status,
        duration_ns=time.monotonic_ns() - start_ns,
        known=guest.known_on(isa, complete),
        observed=dict(observed),
        slowed=slow,
    )


def _run_vm(
    machine: Machine, guest: Guest, arguments: dict[str, int], slow_ns: dict[int, int], timeout_s: float
) -> list[VcpuThread]:
    make_vm, make_vcpu = machine.vmm()
    vm = make_vm(RAM_BYTES, irqchip=guest.irqchip)
    vcpus: list[Vcpu] = []
    try:
        guest.listing.write_to(memoryview(vm.memory))
        vcpus += [make_vcpu(vm, vcpu_id, slow_ns) for vcpu_id in range(guest.n_vcpus)]
        vm.finish()
        vcpus[0].set_registers(guest.registers(arguments), protected=guest.protected)  # it starts the others
        threads = [VcpuThread(vcpu, Counter()) for vcpu in vcpus]
        _run_threads(threads, timeout_s)
    finally:
        for vcpu in vcpus:
            vcpu.close()
        vm.close()
    return threads


def _run_threads(threads: Sequence[VcpuThread], timeout_s: float) -> None:
    """Start all vCPUs and wait; one that fails, or the clock, or Ctrl-C, stops the others."""
    deadline = time.monotonic() + timeout_s
    with _kicks_allowed():
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                if time.monotonic() > deadline or any(_went_wrong(thread) for thread in threads):
                    break
                _join_any(threads, 0.05)
        finally:
            _stop(threads)
    for thread in threads:
        if thread.failure is not None:
            raise KvmtraceError(f"{thread.name} failed: {thread.failure}") from thread.failure


def _went_wrong(thread: VcpuThread) -> bool:
    return thread.failure is not None or thread.ended not in {"", "exit-port"}


def _join_any(threads: Sequence[VcpuThread], seconds: float) -> None:
    for thread in threads:
        if thread.is_alive():
            thread.join(seconds)
            return


def _stop(threads: Sequence[VcpuThread]) -> None:
    """Stop what still runs: the signal makes KVM_RUN return, immediate_exit keeps it from starting again."""
    while running := [thread for thread in threads if thread.is_alive()]:
        for thread in running:
            thread.vcpu.stop()
            if thread.ident is not None and threading.current_thread() is threading.main_thread():
                signal.pthread_kill(thread.ident, _KICK)
        running[0].join(0.02)


@contextmanager
def _kicks_allowed() -> Iterator[None]:
    """Let the kick signal interrupt a system call and do nothing else, as long as vCPUs run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(_KICK, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(_KICK, before)
