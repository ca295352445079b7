"""No command's time grows faster than the file, whatever the file has many of.

In the suite: what is counted by thread, vCPU, reason, address and descriptor. With `make test-lab`: everything.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import pytest
from growth import assert_linear

from kvmtrace.cli.main import cli
from kvmtrace.fleet.store import Store
from kvmtrace.fleet.summarize import summarize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FULL = "info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000"


class Text:
    """Lines of a text trace, each 3 us after the one before."""

    def __init__(self) -> None:
        self.lines = ["# tracer: nop"]
        self._us = 1_000_000

    def say(self, *bodies: str, tid: int = 7, cpu: int = 0) -> None:
        for body in bodies:
            self._us += 3
            stamp = f"{self._us // 1_000_000}.{self._us % 1_000_000:06d}"
            self.lines.append(f" v{tid}-{tid} [{cpu:03d}] d..1. {stamp}: {body}")

    def exit(self, reason: str, *then: str, tid: int = 7, vcpu: int = 0, cpu: int = 0, rip: int = 0x1000) -> None:
        """An entry and an exit, and what follows them."""
        entry = f"kvm_entry: vcpu {vcpu}, rip 0x{rip:x}"
        self.say(entry, f"kvm_exit: vcpu {vcpu} reason {reason} rip 0x{rip:x} {FULL}", *then, tid=tid, cpu=cpu)

    def ioctl(self, fd: int, cmd: int, ret: int, arg: int = 0, tid: int = 7) -> None:
        self.say(f"sys_enter_ioctl: fd={fd} cmd=0x{cmd:x} arg={arg}", f"sys_exit_ioctl: ret={ret}", tid=tid)


def _switch(text: Text, i: int) -> None:
    text.exit("HLT")
    text.say("sched_switch: prev_comm=a prev_pid=7 prev_prio=1 prev_state=S ==> next_comm=b next_pid=0 next_prio=1")
    body = "sched_switch: prev_comm=b prev_pid=0 prev_prio=1 prev_state=R ==> next_comm=a next_pid=7 next_prio=1"
    text.say(body, tid=0)


def _gap(text: Text, cpu: int, n: int) -> None:
    text.exit("CPUID", cpu=cpu)
    text.lines.append(f"CPU:{cpu} [LOST {n} EVENTS]")


def _closed(text: Text, fd: int) -> None:
    text.ioctl(3, CREATE_VM, fd)
    text.say(f"sys_enter_close: fd={fd}", "sys_exit_close: ret=0")


FAULT = "kvm_page_fault: vcpu 0 rip 0x1000 address 0x{:016x} error_code 0x181"
PIO, MMIO = "kvm_userspace_exit: reason KVM_EXIT_IO (2)", "kvm_userspace_exit: reason KVM_EXIT_MMIO (6)"
KVM_RUN, CREATE_VM, CREATE_VCPU, SET_MEMORY = 0xAE80, 0xAE01, 0xAE41, 0x4020AE46
# fmt: off
COUNTS: dict[str, Callable[[Text, int], object]] = {
    "threads": lambda t, i: t.exit("HLT", "kvm_userspace_exit: reason KVM_EXIT_HLT (5)", tid=100 + i, vcpu=i % 256),
    "vCPUs": lambda t, i: t.exit("HLT", vcpu=i),
    "exit reasons": lambda t, i: t.exit(f"0x{i + 100:x}"),
    "addresses": lambda t, i: t.exit("EPT_MISCONFIG", f"kvm_mmio: mmio write len 4 gpa 0x{i * 4096:x} val 0x1", MMIO),
    "descriptors": lambda t, i: t.ioctl(i + 10, KVM_RUN, 0, tid=100 + i),
    "violations": lambda t, i: t.say("kvm_entry: vcpu 0, rip 0x1000", "kvm_entry: vcpu 0, rip 0x1000", tid=50 + i),
    "names of exit reasons": lambda t, i: t.exit(f"R_{i}"),
    "CPUs": lambda t, i: t.exit("CPUID", cpu=i % 32768),
    "ports": lambda t, i: t.exit("IO_INSTRUCTION", f"kvm_pio: pio_write at 0x{i:x} size 1 count 1 val 0x1", PIO),
    "MSRs": lambda t, i: t.exit("MSR_WRITE", f"kvm_msr: msr_write {i:x} = 0x5"),
    "control registers": lambda t, i: t.exit("CR_ACCESS", f"kvm_cr: cr_write {i % 65536:x} = 0x{i:x}"),
    "hypercalls": lambda t, i: t.exit("VMCALL", f"kvm_hypercall: nr 0x{i:x} a0 0x0 a1 0x0 a2 0x0 a3 0x0"),
    "RIPs": lambda t, i: t.exit("CPUID", rip=0x1000 + i * 7),
    "instructions": lambda t, i: t.exit("EPT_MISCONFIG", f"kvm_emulate_insn: 0:1: b8 {i & 255:02x} {i >> 8:02x} 0 0"),
    "page faults": lambda t, i: t.exit("EPT_VIOLATION", FAULT.format(i)),
    "reasons to leave for userspace": lambda t, i: t.exit("CPUID", f"kvm_userspace_exit: reason UNKNOWN ({i})"),
    "errors": lambda t, i: t.exit("CPUID", f"kvm_userspace_exit: reason restart ({i})"),
    "interrupts": lambda t, i: t.say(f"kvm_inj_virq: IRQ 0x{i % 256:x}"),
    "local APICs": lambda t, i: t.say(f"kvm_apic_accept_irq: apicid {i} vec {i % 256} (Fixed|edge)", tid=9),
    "interrupt lines": lambda t, i: t.say(f"kvm_set_irq: gsi {i} level 1 source 0", tid=9),
    "ends of interrupts": lambda t, i: t.say(f"kvm_eoi: apicid {i} vector {i % 256}"),
    "IPIs": lambda t, i: t.say(f"kvm_apic_ipi: dst {i:x} vec {i % 256} (Fixed|physical|assert|edge|dst)"),
    "switches": _switch,
    "wake-ups": lambda t, i: t.say(f"sched_waking: comm=a pid={50 + i} prio=120 target_cpu=000"),
    "gaps": lambda t, i: _gap(t, 0, i + 1),
    "gaps of CPUs": lambda t, i: _gap(t, i % 32768, i + 1),
    "events' names": lambda t, i: t.say(f"event_{i}: x a={i}"),
    "KVM's events' names": lambda t, i: t.say(f"kvm_strange_{i}: x"),
    "nested exits": lambda t, i: t.say(f"kvm_nested_vmexit: vcpu 0 reason CPUID rip 0x1000 {FULL}"),
    "VMs": lambda t, i: t.ioctl(3, CREATE_VM, i + 10),
    "vCPUs of a VM": lambda t, i: t.ioctl(5, CREATE_VCPU, i + 10, i),
    "memory slots": lambda t, i: t.ioctl(5, SET_MEMORY, 0, i),
    "threads of a vCPU": lambda t, i: t.ioctl(6, KVM_RUN, 0, tid=100 + i),
    "closed descriptors": lambda t, i: _closed(t, i + 10),
    "refused calls": lambda t, i: t.ioctl(3, 0xAE00 + i % 65536, -22),
}
# fmt: on
IN_SMALL = ("threads", "exit reasons", "descriptors", "violations", "gaps of CPUs")
BEFORE = ((3, CREATE_VM, 5), (5, CREATE_VCPU, 6))  # calls that every file of calls begins with


def recording(folder: Path, what: str, n: int) -> Path:
    path = folder / f"{what}-{n}.txt".replace(" ", "_")
    text = Text()
    text.exit("CPUID")
    for fd, cmd, ret in BEFORE if COUNTS[what].__code__.co_names[:1] == ("ioctl",) else ():
        text.ioctl(fd, cmd, ret)
    for i in range(n):
        COUNTS[what](text, i)
    path.write_text("\n".join(text.lines) + "\n")
    return path


def run(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main(args=list(arguments), standalone_mode=False)


def _report(path: Path, form: str) -> None:
    run("report", str(path), "--format", form, "-o", f"{path}.{form}", "--force")


def _export(path: Path, suffix: str, *more: str) -> None:
    run("export", str(path), "-o", f"{path}{suffix}", "--force", *more)


def _summarize(path: Path) -> None:
    Store(str(path.parent / "fleet")).write_summary(summarize(path, str(path)))


COMMANDS: dict[str, Callable[[Path], None]] = {
    "check": lambda path: run("check", str(path)),
    "report": lambda path: _report(path, "text"),
    "report, JSON": lambda path: _report(path, "json"),
    "report, HTML": lambda path: _report(path, "html"),
    "compare": lambda path: run("compare", str(path), str(path)),
    "export, Parquet": lambda path: _export(path, ".parquet"),
    "export, exits": lambda path: _export(path, ".csv", "--table", "vm_exits"),
    "export, Perfetto": lambda path: _export(path, ".pftrace"),
    "fleet summarize": _summarize,
}


@pytest.fixture(autouse=True, scope="module")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported when it is first used is not part of what is measured."""
    path = recording(tmp_path_factory.mktemp("warm"), "threads", 20)
    for command in COMMANDS.values():
        command(path)


def measure(folder: Path, what: str, n: int) -> None:
    for name, command in COMMANDS.items():
        try:
            assert_linear(lambda n: recording(folder, what, n), command, n)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("what", IN_SMALL)
def test_commands(what: str, tmp_path: Path) -> None:
    measure(tmp_path, what, 500)


@pytest.mark.slow
@pytest.mark.parametrize("what", COUNTS)
def test_commands_on_larger_files(what: str, tmp_path: Path) -> None:
    measure(tmp_path, what, 2500)
