"""S2: a register that only holds what is written to it reads back what the guest wrote last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.userspace_changes import ioctl_kind, setter_rows
from kvmtrace.kvm.apic import describe_apic_register
from kvmtrace.kvm.ioctls import IOCTL_NUMBERS
from kvmtrace.kvm.msrs import MSR_IA32_APIC_BASE, describe_msr
from kvmtrace.model.held_registers import HELD_LAPIC, HELD_MSRS, MSR_SETTERS
from kvmtrace.model.injection import INIT_DELIVERY_MODE
from kvmtrace.table.distinct import among, distinct
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

    Positions = NDArray[np.intp]
    Bits = Mapping[int, int]  # of a register: those that it holds

RULE = Rule(
    "S2",
    "registers read back",
    VIOLATION,
    ("sys_enter_ioctl.cmd|kvm_vcpu_ioctl.cmd",),
    "A register that holds what is written to it, of the memory types or of the LAPIC, reads back what the same vCPU "
    "wrote last, unless the VMM set it.",
    "kvm_set_msr_common, kvm_get_msr_common (x86.c), kvm_mtrr_set_msr (mtrr.c); kvm_lapic_reg_write (lapic.c)",
    "registers that the guest reads or writes without a VM-exit",
    places="kvm_msr",
    blames_handler=False,
    healthy="""
sys_enter_ioctl: fd=0x8 cmd=0xae80 arg=0x0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=1 ecx=277 data=0x7040600070406 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=31 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=0 ecx=277 data=0x7040600070406 exception=0
kvm_entry: vcpu_id=0 rip=0x1004
""",
    broken="""
sys_enter_ioctl: fd=0x8 cmd=0xae80 arg=0x0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=1 ecx=277 data=0x7040600070406 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=31 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=0 ecx=277 data=0x606 exception=0
kvm_entry: vcpu_id=0 rip=0x1004
""",
)


MAX_CHANGES = 1 << 16  # times that are remembered


@RULE.part("memory types", needs=("kvm_msr.ecx", "kvm_msr.write", "kvm_msr.data", "kvm_msr.exception"))
def _msrs(excerpt: Excerpt, found: Found) -> None:
    positions = excerpt.segments.positions("kvm_msr")
    ecx = excerpt.sequence.values("kvm_msr", "ecx", positions).astype(np.int64)
    mine = among(ecx, HELD_MSRS) & (excerpt.sequence.values("kvm_msr", "exception", positions) == 0)
    held = excerpt.remember("MSRs as written", lambda: _Held(HELD_MSRS, describe_msr))
    held.change(excerpt, _rows_of_ioctls(excerpt, MSR_SETTERS))
    held.follow(excerpt, positions[mine], ("kvm_msr", "ecx", "write", "data"), found)


@RULE.part(
    "LAPIC",
    needs=("kvm_apic.reg", "kvm_apic.rw", "kvm_apic.val", "kvm_apic_accept_irq.dm", "kvm_msr.ecx"),
    places="kvm_apic",
    adds=False,
)
def _lapic(excerpt: Excerpt, found: Found) -> None:
    positions = excerpt.segments.positions("kvm_apic")
    register = excerpt.sequence.values("kvm_apic", "reg", positions).astype(np.int64)
    held = excerpt.remember("LAPIC as written", lambda: _Held(HELD_LAPIC, describe_apic_register))
    held.change(excerpt, np.append(setter_rows(excerpt), _resets(excerpt)))
    held.follow(excerpt, positions[among(register, HELD_LAPIC)], ("kvm_apic", "reg", "rw", "val"), found)


class _Held:
    """What registers hold, of all vCPUs, over a whole recording.

    Parameters
    ----------
    bits : register -> those that it holds
    describe : names a register
    """

    def __init__(self, bits: Bits, describe: Callable[[int], str]) -> None:
        self._bits, self._describe = bits, describe
        self._held: dict[tuple[int, int], tuple[int, int]] = {}  # (vCPU, register) -> value, time of the write
        self._changes: NDArray[np.int64] = np.empty(0, np.int64)  # ascending: when the VMM or a reset may have set any

    def change(self, excerpt: Excerpt, rows: NDArray[np.intp]) -> None:
        """Take note of rows of any thread at which registers may change; what was lost may have been one."""
        table = excerpt.sequence.table
        lost = table.rows(LOST_EVENTS) if LOST_EVENTS in table.kind_index else rows[:0]
        times = np.concatenate([self._changes, table.ts_ns[rows], table.ts_ns[lost]])
        self._changes = distinct(times)[-MAX_CHANGES:]

    def follow(self, excerpt: Excerpt, positions: Positions, names: tuple[str, str, str, str], found: Found) -> None:
        """Follow accesses to registers.

        Parameters
        ----------
        names : of their event, and of its fields of the register, the direction and the value
        """
        sequence = excerpt.sequence
        kind, *fields = names
        columns = [sequence.values(kind, name, positions).astype(np.uint64).tolist() for name in fields]
        breaks = np.cumsum(sequence.broken)
        ts_ns = sequence.ts_ns[positions]
        # a change at the very moment may lie on either side
        before, after = (np.searchsorted(self._changes, ts_ns, side).tolist() for side in ("left", "right"))
        threads, broken, times = sequence.thread[positions].tolist(), breaks[positions].tolist(), ts_ns.tolist()
        written: dict[tuple[int, int], tuple[int, int]] = {}  # what was known at the write, of this excerpt
        wrong: list[tuple[int, int, int, int]] = []
        checked = 0
        for number, (register, write, value) in enumerate(zip(*columns, strict=True)):
            key, mask = (sequence.key_of(threads[number]), register), self._bits[register]
            if write:
                self._held[key], written[key] = (value & mask, times[number]), (before[number], broken[number])
                continue
            if key not in self._held:
                continue
            holds, since = self._held[key]
            epoch, breaks_then = written.get(key, (int(np.searchsorted(self._changes, since)), 0))
            if (epoch, breaks_then) != (after[number], broken[number]):
                del self._held[key]
                continue
            checked += 1
            if value & mask != holds:
                wrong.append((number, register, holds, value & mask))
        self._forget(written, int(breaks[-1]) if len(breaks) else 0)
        found.check(checked)
        found.violate(
            positions[[number for number, _, _, _ in wrong]],
            lambda i: (
                f"{self._describe(wrong[i][1])} holds {wrong[i][2]:#x}, as the guest wrote",
                f"{wrong[i][3]:#x}",
            ),
        )

    def _forget(self, written: dict[tuple[int, int], tuple[int, int]], n_breaks: int) -> None:
        """Drop what was written before a break."""
        for key in [key for key in self._held if written.get(key, (0, 0))[1] != n_breaks]:
            del self._held[key]


def _rows_of_ioctls(excerpt: Excerpt, names: tuple[str, ...]) -> NDArray[np.intp]:
    """Return the rows, of any thread, at which one of these requests is made."""
    table = excerpt.sequence.table
    kind = ioctl_kind(excerpt) or "sys_enter_ioctl"
    cmd = table.field(kind, "cmd").astype(np.int64) & 0xFFFFFFFF
    rows: NDArray[np.intp] = table.rows(kind)[among(cmd, [IOCTL_NUMBERS[name] for name in names])]
    return rows


def _resets(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the rows, of any thread, at which a LAPIC may be reset or change its mode."""
    table = excerpt.sequence.table
    init = table.field("kvm_apic_accept_irq", "dm").astype(np.int64) == INIT_DELIVERY_MODE
    moved = table.field("kvm_msr", "ecx").astype(np.int64) == MSR_IA32_APIC_BASE
    rows: NDArray[np.intp] = np.append(table.rows("kvm_apic_accept_irq")[init], table.rows("kvm_msr")[moved])
    return rows
