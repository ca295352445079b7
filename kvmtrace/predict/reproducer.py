"""A guest that repeats a vCPU's VM-exits: the instructions that cause them, in order, in the form of the listings.

What an exit was about is told by its follow-ups (kvm_pio, kvm_mmio, kvm_cpuid, kvm_msr, kvm_hypercall) and, for HLT, by
its reason. Exits that the host causes (interrupts, first touches of memory) come by themselves or not at all; others
that no single instruction of a real-mode guest stands for are counted and named. An interrupt that was injected is
stood in for by INT n, an exception by nothing: the instruction that raised it is there.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.explain import StoryEvent, describe_missing, exits_of, read_event
from kvmtrace.errors import UsageError
from kvmtrace.isa.registry import BY_NUMBER, ISAS
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.predict.assembler import GP_VECTOR, Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.isa.base import Isa
    from kvmtrace.table.event_table import EventTable

MOST_EXITS = 2000  # looked at, before the one that is explained
ACCESSES = ("kvm_pio", "kvm_mmio", "kvm_cpuid", "kvm_msr", "kvm_hypercall")
UNSATISFIED, READ, WRITE = 0, 1, 2  # include/trace/events/kvm.h, kvm_mmio's type
EXIT_PORT = 0xF4


@dataclass(frozen=True)
class Reproducer:
    """A program, and what of the recording it does not repeat.

    Parameters
    ----------
    program : Program
    first, last : numbers of the VM-exits that it repeats, from 1
    left_out : exit reason -> how many of them have no instruction here
    """

    program: Program
    first: int
    last: int
    left_out: dict[str, int]


def reproduce(events: EventTable, number: int, *, tid: int | None = None, vcpu: int | None = None) -> Reproducer:
    """Return a guest that repeats a vCPU's VM-exits up to one of them.

    Parameters
    ----------
    events : EventTable
    number : the last VM-exit to repeat, as `explain_exit` counts
    tid, vcpu : the vCPU's thread or id; by default the first that exits

    Raises
    ------
    UsageError
        There is no such VM-exit, or its ISA has no guests of this form.
    """
    exits = exits_of(events, tid, vcpu)
    if not 1 <= number <= len(exits):
        raise UsageError(describe_missing(events, number, tid, vcpu))
    mine = np.flatnonzero(events.tid == events.tid[exits[0]])
    first = max(number - MOST_EXITS, 0)
    while True:
        program = Program(_vendor_call(events, exits))
        left_out: Counter[str] = Counter()
        for i in range(first, number):
            end = exits[i + 1] if i + 1 < len(exits) else len(events)
            _repeat(_Window(events, mine, int(exits[i]), int(end)), program, left_out)
        program.finish(EXIT_PORT)
        if program.fits:
            return Reproducer(program, first + 1, number, dict(left_out))
        first += max((number - first) // 4, 1)  # the oldest go


def _vendor_call(events: EventTable, exits: NDArray[np.intp]) -> bytes:
    """Return the ISA's hypercall instruction."""
    fields = read_event(events, int(exits[0])).fields
    isa = BY_NUMBER.get(int(fields.get("isa", 0)), ISAS[0])
    if not isa.hypercall:
        raise UsageError(f"there are no such guests for {isa.name}")
    return isa.hypercall


class _Window:
    """The thread's events from one VM-exit to the next."""

    def __init__(self, events: EventTable, mine: NDArray[np.intp], row: int, end: int) -> None:
        rows = mine[np.searchsorted(mine, row) : np.searchsorted(mine, end)]
        names = [events.kinds[kind].name for kind in events.kind[rows].tolist()]
        wanted = {*ACCESSES, "kvm_inj_virq", "kvm_inj_exception", "kvm_exit"}
        self.events = [read_event(events, int(r)) for r, name in zip(rows, names, strict=True) if name in wanted]
        fields = self.events[0].fields
        self.isa: Isa = BY_NUMBER.get(int(fields.get("isa", 0)), ISAS[0])
        self.raw = int(fields["exit_reason"])
        self.reason = self.isa.describe(self.raw)

    def of(self, *kinds: str) -> list[StoryEvent]:
        """Return the events of these kinds."""
        return [event for event in self.events if event.event in kinds]

    @property
    def comes_by_itself(self) -> bool:
        """Whether the host causes such an exit, or a first touch of memory."""
        return self.isa.code(self.raw) in self.isa.codes("host", "asynchronous", "second_level_fault")

    @property
    def raises_gp(self) -> bool:
        """Whether #GP was injected."""
        return any(int(e.fields.get("exception", -1)) == GP_VECTOR for e in self.of("kvm_inj_exception"))


def _repeat(window: _Window, program: Program, left_out: Counter[str]) -> None:
    """Add what stands for one VM-exit."""
    accesses = window.of(*ACCESSES)
    if accesses:
        _REPEATED[accesses[0].event](window, accesses, program)
    elif window.reason.lower() == "hlt":
        program.halt()
    elif not window.comes_by_itself:
        left_out[window.reason] += 1
    for event in window.of("kvm_inj_virq"):
        program.interrupt(int(event.fields["vector"]))


def _port(_window: _Window, accesses: list[StoryEvent], program: Program) -> None:
    ports = [event for event in accesses if event.event == "kvm_pio"]
    fields = [event.fields for event in ports]
    number, size, out = int(fields[0]["port"]), int(fields[0]["size"]), bool(fields[0]["rw"])
    elements = sum(int(one["count"]) for one in fields)
    if elements > 1:
        program.string_port(number, size, elements, out=out)
    elif not (number == EXIT_PORT and out):  # which ends the guest: at the end
        program.port(number, size, int(fields[0].get("val", 0)), out=out)


def _memory(_window: _Window, accesses: list[StoryEvent], program: Program) -> None:
    done = [event.fields for event in accesses if event.event == "kvm_mmio"]
    for one in done:
        kind = int(one["type"])
        if kind == WRITE or (kind == UNSATISFIED or len(done) == 1):
            program.memory(int(one["gpa"]), int(one["len"]), int(one.get("val", 0)), write=kind == WRITE)


def _cpuid(_window: _Window, accesses: list[StoryEvent], program: Program) -> None:
    fields = accesses[0].fields
    program.cpuid(int(fields["function"]), int(fields.get("index", 0)))


def _msr(window: _Window, accesses: list[StoryEvent], program: Program) -> None:
    fields = accesses[0].fields
    program.msr(int(fields["ecx"]), int(fields["data"]), write=bool(fields["write"]), faults=window.raises_gp)


def _hypercall(_window: _Window, accesses: list[StoryEvent], program: Program) -> None:
    program.hypercall(int(accesses[0].fields["nr"]))


_REPEATED: dict[str, Callable[[_Window, list[StoryEvent], Program], None]] = {
    "kvm_pio": _port,
    "kvm_mmio": _memory,
    "kvm_cpuid": _cpuid,
    "kvm_msr": _msr,
    "kvm_hypercall": _hypercall,
}
