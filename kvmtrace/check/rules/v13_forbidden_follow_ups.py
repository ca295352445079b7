"""V13: events that an exit's handler cannot trace, or not in this order, do not appear."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT, FOLLOW_UP_MASK, mask_of
from kvmtrace.check.excerpt import owed_events
from kvmtrace.check.fast_path import OFF_FAST_PATH, slow_msrs
from kvmtrace.check.findings import constant
from kvmtrace.check.forbidden import check_forbidden, is_window
from kvmtrace.check.guest_levels import nestings
from kvmtrace.check.rule import VIOLATION, RowPart, Rule
from kvmtrace.check.state_machine import STATE, STATE_NAMES
from kvmtrace.check.wrong_steps import kind_of
from kvmtrace.isa.base import RipClass
from kvmtrace.isa.shared import EMULATOR_EVENTS
from kvmtrace.model.nesting import ENTERS_L2
from kvmtrace.model.ordering import EXCLUSIVE, ORDER
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS, STEPS
from kvmtrace.model.transitions import GUEST_EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow
    from kvmtrace.model.ordering import Order

    Group = NDArray[np.intp]

RULE = Rule(
    "V13",
    "forbidden follow-up",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa"),
    "Events that this exit's handler cannot trace, or not in this order, do not appear before the vCPU resumes.",
    "kvm_vmx_exit_handlers (vmx/vmx.c), svm_exit_handlers (svm/svm.c)",
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=1 guest_rip=0x1010 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1010
""",
)
# bystanders that KVM cannot trace in guest mode; sched_switch is V3's
_NOT_IN_GUEST = mask_of(*(name for name in BYSTANDERS if name not in GUEST_EVENTS | {"sched_switch"}))
_INJECTIONS = ("inject interrupt", "inject exception")


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if not is_window(row):  # J7's
        yield RowPart("", (), partial(check_forbidden, row=row))
    for name in _decoded_only(row):
        yield RowPart("", ("kvm_emulate_insn", name), partial(_check_decoded, name=name), _never)
    if row.rip is RipClass.ADVANCE and not row.may >= EMULATOR_EVENTS:
        for name in sorted(owed_events(row) & set(FOLLOW_UPS) - {"kvm_emulate_insn"}):
            yield RowPart("", ("kvm_emulate_insn", name), partial(_check_skip_order, name=name), _never)


@RULE.part(
    "beside a nested entry",
    needs=("|".join(ENTERS_L2), "kvm_exit.exit_reason", "kvm_exit.isa"),
    places=lambda excerpt: sum(len(group) for _, group in _nested_entries(excerpt)),
    adds=False,
    source="nested_svm_vmrun (svm/nested.c), nested_vmx_run (vmx/nested.c)",
)
def _beside_nested_entries(excerpt: Excerpt, found: Found) -> None:
    """Check that what enters L2 does nothing else on L1's behalf."""
    for row, group in _nested_entries(excerpt):
        check_forbidden(excerpt, group, found, row=row)


def _nested_entries(excerpt: Excerpt) -> Iterator[tuple[ExitRow, Group]]:
    """Yield the rows of instructions that enter L2, with their exits that did."""
    exits = excerpt.exits
    entered = excerpt.of_kind("nested_entry") & exits.has(*ENTERS_L2) & ~exits.failed_entry
    for _, isa, mine in nestings(excerpt):
        for code in isa.codes("nested_entry"):
            group = np.flatnonzero(entered & mine & (exits.code == code))
            if len(group):
                yield isa.exits[code], group


def _never(_excerpt: Excerpt, _group: Group) -> int:
    """Return 0: without the events that stand in an order there is none."""
    return 0


def _decoded_only(row: ExitRow) -> list[str]:
    """Return the events that this exit can trace by emulating an instruction only."""
    return sorted((row.may & EMULATOR_EVENTS) - (owed_events(row) - {"kvm_mmio"}) - {"kvm_emulate_insn"})


def _check_decoded(excerpt: Excerpt, group: Group, found: Found, *, name: str) -> None:
    """Check that what the emulator alone could trace stands behind a kvm_emulate_insn."""
    some = group[excerpt.exits.has(name)[group]]
    at = excerpt.first_in_exit(name, some)
    decode = excerpt.first_in_exit("kvm_emulate_insn", some)
    bad = np.flatnonzero((decode < 0) | (decode > at))
    found.check(len(some))
    found.violate(
        at[bad],
        lambda i: (
            f"kvm_emulate_insn before {name} after {excerpt.exit_name(some[bad[i]])}",
            f"{name} without a decoded instruction",
        ),
    )


def _check_skip_order(excerpt: Excerpt, group: Group, found: Found, *, name: str) -> None:
    """Check that an instruction is decoded for skipping behind what its handler traces."""
    some = group[excerpt.exits.has(name)[group] & excerpt.exits.has("kvm_emulate_insn")[group]]
    decode = excerpt.first_in_exit("kvm_emulate_insn", some)
    bad = np.flatnonzero(decode < excerpt.first_in_exit(name, some))
    found.check(len(some))
    found.violate(decode[bad], constant(f"{name} before the instruction is skipped", "kvm_emulate_insn first"))


@RULE.part("events where no handler runs", adds=False, local=True)
def _stray(excerpt: Excerpt, found: Found) -> None:
    """Report follow-ups of VM-exits in states where KVM does not run a handler."""
    sequence, state, automaton = excerpt.sequence, excerpt.steps.state, excerpt.automaton
    cls = sequence.cls.astype(np.uint64)
    stray = (FOLLOW_UP_MASK >> cls & np.uint64(1) == 1) & ~automaton.follow_ups.take(state)
    if not automaton.follow_ups[STATE["guest"]]:
        in_guest = (state == STATE["guest"]) | (state == STATE["switching_in"])
        stray |= in_guest & (_NOT_IN_GUEST >> cls & np.uint64(1) == 1)
    wrong = np.flatnonzero(stray)
    found.violate(
        wrong,
        lambda i: (f"no such event in state {STATE_NAMES[int(state[wrong[i]])]}", kind_of(excerpt, int(wrong[i]))),
    )


def _last_in(excerpt: Excerpt, name: str) -> NDArray[np.intp]:
    """Return, per segment, the position of its last event of a class, or -1."""
    last = np.full(len(excerpt.segments), -1, np.intp)
    positions = excerpt.segments.positions(name)
    last[excerpt.segments.of[positions]] = positions  # later assignments win
    return last


def _check_order(excerpt: Excerpt, found: Found, *, order: Order) -> None:
    earlier, later = order.earlier, order.later
    group = np.flatnonzero(~excerpt.nested & excerpt.exits.has(earlier) & excerpt.exits.has(later))
    if not len(group):
        return
    second = excerpt.first_in_exit(later, group)
    if order.last:
        first = _last_in(excerpt, earlier)[excerpt.exits.seg[group]]
    else:
        first = excerpt.first_in_exit(earlier, group)
    bad = np.flatnonzero(first > second)
    if earlier == "kvm_emulate_insn":  # a soft event's injection pass decodes, too: after everything else
        bad = bad[~excerpt.exits.has(*_INJECTIONS)[group[bad]]]
    found.check(len(group))
    found.violate(second[bad], constant(f"{earlier} before {later}", f"{later} first"))


for _order in ORDER:
    _kinds = tuple(STEPS[name].kind if name in STEPS else name for name in (_order.earlier, _order.later))
    RULE.part(
        f"{_order.earlier} before {_order.later}", needs=_kinds, places=lambda _excerpt: 0, adds=False, local=True
    )(partial(_check_order, order=_order))


def _check_exclusive(excerpt: Excerpt, found: Found, *, one: str, other: str) -> None:
    """Check that an access taken by one path is not done by the other as well."""
    group = np.flatnonzero(~excerpt.nested & excerpt.exits.has(one))
    bad = group[excerpt.exits.has(other)[group]]
    found.check(len(group))
    found.violate(excerpt.exits.start[bad], constant(f"{one} or {other}", "both"))


for _one, _other in EXCLUSIVE:
    RULE.part(f"{_one} or {_other}", needs=(_one, _other), places=lambda _excerpt: 0, adds=False, local=True)(
        partial(_check_exclusive, one=_one, other=_other)
    )


def _count_late(excerpt: Excerpt) -> int:
    return len(excerpt.exits) if _late(excerpt) else 0


@RULE.part("what precedes a late kvm_exit", needs=("kvm_entry",), places=_count_late, adds=False, local=True)
def _late_exit(excerpt: Excerpt, found: Found) -> None:
    """Check what lies between kvm_entry and a kvm_exit that is traced late.

    From the run function to the handler only the fast path of x2APIC (svm_exit_handlers_fastpath) is a follow-up.
    """
    inside = _late_stays(excerpt)
    stray = inside[(excerpt.segments.mask[inside] & OFF_FAST_PATH) != 0]
    found.check(len(inside))
    _report_late(excerpt, stray, found)


@RULE.part(
    "MSRs before a late kvm_exit",
    needs=("kvm_entry", "kvm_msr.ecx", "kvm_msr.write"),
    places=_count_late,
    adds=False,
    local=True,
)
def _late_msrs(excerpt: Excerpt, found: Found) -> None:
    """Check that only MSRs that a fast path writes are traced there."""
    inside, segments = _late_stays(excerpt), excerpt.segments
    slow = np.zeros(len(segments), bool)
    slow[segments.of[slow_msrs(excerpt)]] = True
    others = (segments.mask[inside] & OFF_FAST_PATH) != 0
    _report_late(excerpt, inside[slow[inside] & ~others], found)


def _late_stays(excerpt: Excerpt) -> Group:
    """Return the stays in guest mode that end in a late kvm_exit."""
    segments = excerpt.segments
    inside = np.flatnonzero((segments.kind == ENTRY) & (segments.next_kind == EXIT))
    return inside if _late(excerpt) else inside[:0]


def _report_late(excerpt: Excerpt, stray: Group, found: Found) -> None:
    found.violate(
        excerpt.segments.start[stray] + 1,
        constant("no handler's event before kvm_exit", "a follow-up of the exit in guest mode"),
    )


def _late(excerpt: Excerpt) -> bool:
    """Say whether kvm_exit is traced with interrupts on, behind the run function."""
    return excerpt.capability.exit_irqs_off is False
