"""V4: the events that an exit's handler always traces do appear, as often as it traces them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT, mask_of
from kvmtrace.check.decoding import decodes, failed_segments
from kvmtrace.check.excerpt import EXPECTATIONS, class_of_kind
from kvmtrace.check.exit_conditions import any_holds, complete, needs_of
from kvmtrace.check.findings import constant
from kvmtrace.check.halted_vcpus import sleeps, slept
from kvmtrace.check.instruction_bytes import CS_L, is_string
from kvmtrace.check.mmio_chain import MMIO_WRITE
from kvmtrace.check.rule import VIOLATION, RowPart, Rule
from kvmtrace.isa.base import RipClass
from kvmtrace.model.thresholds import threshold
from kvmtrace.model.traced_by import TRACED_BY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow, Must

    Group = NDArray[np.intp]

RULE = Rule(
    "V4",
    "mandatory follow-up",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa"),
    "The events that the exit's handler always traces do appear before the vCPU resumes.",
    "kvm_vmx_exit_handlers (vmx/vmx.c), svm_exit_handlers (svm/svm.c)",
    local_rows=True,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=12 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
kvm_halt_poll_ns: grow=1 vcpu_id=0 new=10000 old=0
kvm_vcpu_wakeup: ns=900 waited=1 valid=1
kvm_entry: vcpu_id=0 rip=0x1003
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=10 guest_rip=0x1010 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1012
""",
)
_INJECTIONS = mask_of("inject interrupt", "inject exception")
DECODED_SKIPS, DECODED_SHARE = threshold("decoded_skips"), threshold("decoded_share")


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    for must in row.must:
        # an alternative that was not recorded may have been the one
        needs = (*must.events, *needs_of(must.unless))
        by = "; ".join(TRACED_BY[event] for event in must.events if event in TRACED_BY)
        yield RowPart(f"{' or '.join(must.events)}", needs, partial(_check_must, must=must), source=by)


def _occurrences(excerpt: Excerpt, group: Group, kinds: tuple[str, ...]) -> NDArray[np.intp]:
    """Return how many events of these kinds each exit's segment holds."""
    total = np.zeros(len(group), np.intp)
    for kind in kinds:
        total += excerpt.segment_counts(class_of_kind(kind))[excerpt.exits.seg[group]]
        if kind == "kvm_emulate_insn":
            total -= failed_segments(excerpt)[excerpt.exits.seg[group]]
    return total


def _check_must(excerpt: Excerpt, group: Group, found: Found, *, must: Must) -> None:
    least, most = must.count
    known = complete(excerpt, group)
    traced = _occurrences(excerpt, group, must.events)
    wrong = known & (traced < least)
    if most is not None:
        # an injection pass may decode the instruction that it injects (soft events on SVM without NRIPS)
        own = (excerpt.exits.mask[group] & _INJECTIONS) == 0
        wrong |= known & (traced > most) & (own | ("kvm_emulate_insn" not in must.events))
    at = np.flatnonzero(wrong)
    at = at[~any_holds(must.unless, excerpt, group[at])]
    found.check(np.count_nonzero(known), np.count_nonzero(~known))
    bad = group[at]

    def describe(i: int) -> tuple[str, str]:
        times = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        return (f"{times} of {' or '.join(must.events)} after {excerpt.exit_name(bad[i])}", f"{int(traced[at[i]])}")

    found.violate(excerpt.exits.start[bad], describe)


@RULE.part("wake-ups", needs=("kvm_vcpu_wakeup", "sched_switch.prev_state"), adds=False, local=True)
def _wake_up(excerpt: Excerpt, found: Found) -> None:
    """Check that a halted vCPU that slept traces kvm_vcpu_wakeup when it goes on (kvm_vcpu_halt)."""
    exits, group = excerpt.exits, slept(excerpt)
    bad = group[~exits.has("wake-up")[group]]
    found.check(len(group))
    found.violate(
        excerpt.segments.start[exits.seg[bad] + 1],
        lambda i: (f"kvm_vcpu_wakeup: {excerpt.exit_name(bad[i])} put the thread to sleep", "none"),
    )


@RULE.part(
    "wake-ups behind halt polling",
    needs=("kvm_halt_poll_ns", "kvm_vcpu_wakeup"),
    places="halt poll",
    adds=False,
    source="kvm_vcpu_halt (virt/kvm/kvm_main.c)",
    local=True,
)
def _polled(excerpt: Excerpt, found: Found) -> None:
    """Check that the wake-up of a vCPU that halted is traced behind the adapted interval of its polling."""
    segments = excerpt.segments
    polls, wakes = segments.positions("halt poll"), segments.positions("wake-up")
    last_poll, last_wake = np.full((2, len(segments)), -1, np.intp)
    last_poll[segments.of[polls]], last_wake[segments.of[wakes]] = polls, wakes
    judged = np.flatnonzero((last_poll >= 0) & segments.linked)
    bad = last_poll[judged[last_wake[judged] < last_poll[judged]]]
    found.check(len(judged))
    found.violate(bad, constant("kvm_vcpu_wakeup behind kvm_halt_poll_ns", "none"))


@RULE.part(
    "how a halted vCPU waited",
    needs=("kvm_vcpu_wakeup.waited", "sched_switch.prev_state"),
    places="wake-up",
    adds=False,
    local=True,
)
def _waited(excerpt: Excerpt, found: Found) -> None:
    segments, group = excerpt.segments, slept(excerpt)
    wakes = segments.positions("wake-up")
    waited = np.zeros(len(segments), bool)
    waited[segments.of[wakes[excerpt.sequence.values("kvm_vcpu_wakeup", "waited", wakes) != 0]]] = True
    # a vCPU that was woken up may sleep again, without a word, as another one stops it (kvm_vcpu_sleep, arm64's arm.c)
    last = np.full(len(segments), -1, np.intp)
    last[segments.of[wakes]] = wakes
    asleep = sleeps(excerpt)
    waited[segments.of[asleep[asleep > last[segments.of[asleep]]]]] = True
    polled = excerpt.first_in_exit("wake-up", group)
    polled = polled[(polled >= 0) & ~waited[excerpt.exits.seg[group]]]
    found.violate(polled, constant("kvm_vcpu_wakeup with waited 1: the thread slept", "waited 0 (polled)"))


@RULE.part(
    "one decode an exit",
    needs=("kvm_emulate_insn.rip", "kvm_emulate_insn.flags", "kvm_emulate_insn.failed"),
    places="kvm_emulate_insn",
    adds=False,
    local=True,
)
def _decoded_once(excerpt: Excerpt, found: Found) -> None:
    """Report an instruction that one exit decodes twice.

    Legal are soft events injected where KVM decodes to skip, and the emulation of invalid guest state (real mode and
    switches to it, on hosts without unrestricted guest).
    """
    exits, segments, sequence = excerpt.exits, excerpt.segments, excerpt.sequence
    if not len(exits):
        return
    twice = decodes(excerpt)[exits.seg] > 1
    decodes_to_skip = excerpt.of_isa(lambda isa: isa.decodes_to_skip)
    twice &= ~(decodes_to_skip & exits.has("inject interrupt", "inject exception"))
    positions = segments.positions("kvm_emulate_insn")
    rip, flags, failed = (sequence.values("kvm_emulate_insn", name, positions) for name in ("rip", "flags", "failed"))
    owner = segments.of[positions]
    number = np.minimum(np.searchsorted(exits.seg, owner), len(exits) - 1)
    real_mode = excerpt.of_isa(lambda isa: isa.emulates_real_mode)[number]
    again = (((flags & CS_L) != 0) | ~real_mode) & (failed == 0)
    again[:1] = False
    again[1:] &= (owner[1:] == owner[:-1]) & (rip[1:] == rip[:-1])
    marked = np.full(len(segments), -1, np.intp)
    marked[owner[again]] = positions[again]
    bad = np.flatnonzero(twice & ~excerpt.nested & (marked[exits.seg] >= 0))
    found.violate(
        marked[exits.seg[bad]],
        constant("one kvm_emulate_insn: the handler decodes an instruction once", "the same instruction again"),
    )


def _decoded_to_skip(row: ExitRow | None) -> bool:
    """Say whether KVM may have to decode this instruction to skip it; of IN and OUT the exit tells the next RIP."""
    if row is None or row.rip is not RipClass.ADVANCE:
        return False
    return "emulated_rip" in row.checks and "io_next_rip" not in row.checks


@RULE.part(
    "decoded skips",
    needs=("kvm_emulate_insn", "kvm_exit.guest_rip", "kvm_entry.rip", "kvm_inj_exception"),
    adds=False,
)
def _skips_are_decoded(excerpt: Excerpt, found: Found) -> None:
    """Report skipped instructions that were not decoded, on hosts that must decode to skip."""
    exits = excerpt.exits
    skips = np.zeros(len(exits), bool)
    for number, group in excerpt.groups.items():
        skips[group] = _decoded_to_skip(EXPECTATIONS[number])
    skips &= excerpt.of_isa(lambda isa: isa.decodes_to_skip) & (exits.next_kind == ENTRY)
    skips &= exits.resume_rip != exits.get("guest_rip")
    skips &= ~exits.has("inject exception", "kvm_smm_transition")
    decoded = exits.has("kvm_emulate_insn")
    with_decode, without = np.count_nonzero(skips & decoded), np.count_nonzero(skips & ~decoded)
    if with_decode < DECODED_SKIPS or without * DECODED_SHARE > with_decode:
        return
    found.check(with_decode + without)
    found.violate(
        exits.start[skips & ~decoded],
        constant("kvm_emulate_insn: this host decodes every instruction to skip it (no NRIPS)", "none"),
    )


@RULE.part(
    "one MMIO write an instruction",
    needs=("kvm_mmio.type", "kvm_mmio.gpa", "kvm_mmio.len", "kvm_emulate_insn.insn"),
    places="kvm_mmio",
    adds=False,
    local=True,
)
def _written_once(excerpt: Excerpt, found: Found) -> None:
    """Report an MMIO write that one instruction, no string instruction, does twice."""
    segments, sequence = excerpt.segments, excerpt.sequence
    positions = segments.positions("kvm_mmio")
    owner = segments.of[positions]
    columns = [sequence.values("kvm_mmio", name, positions) for name in ("type", "gpa", "len")]
    same = columns[0] == MMIO_WRITE
    same[:1] = False
    for value in (owner, *columns):
        same[1:] &= value[1:] == value[:-1]
    positions, owner = positions[same], owner[same]
    insn = segments.first_in("kvm_emulate_insn")[owner]
    once = (insn >= 0) & (segments.kind[owner] == EXIT) & (segments.counts("kvm_emulate_insn")[owner] == 1)
    positions, insn = positions[once], insn[once]
    code = sequence.values("kvm_emulate_insn", "insn", insn)
    plain = [not is_string(bytes(row))[1] for row in code]
    found.violate(
        positions[np.array(plain, bool)],
        constant("one kvm_mmio write: the instruction writes once", "the same write again"),
    )
