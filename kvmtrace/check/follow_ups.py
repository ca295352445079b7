"""Follow-ups of VM-exits: those owed (V4), those forbidden (V13, J7), by the exit tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, CLASS_NAMES, FOLLOW_UP_MASK, mask_of
from kvmtrace.check.batch import EXPECTATIONS, allowed_mask, class_of_kind
from kvmtrace.check.decoding import failed_segments
from kvmtrace.check.predicates import any_holds, complete
from kvmtrace.isa.exit_reasons import ISA_SVM, describe_exit_reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.isa.base import ExitExpectation, Must

    Group = NDArray[np.intp]

INTERRUPT_WINDOWS = {(1, 7), (2, 0x64)}
_INJECTIONS = mask_of("inject interrupt", "inject exception")
_EMULATE = mask_of("kvm_emulate_insn")


def exit_name(batch: Batch, number: int) -> str:
    """Return the name of an exit's reason."""
    return describe_exit_reason(int(batch.exits.isa[number]), int(batch.exits.raw[number]))


def check_follow_ups(batch: Batch) -> None:
    """Check V4, V13 and J7 for every exit."""
    for number, group in batch.groups.items():
        row = EXPECTATIONS[number]
        assert row is not None
        known = complete(batch, group)
        for must in row.must:
            _check_must(batch, group, known, must)
        _check_forbidden(batch, group, row)


def _occurrences(batch: Batch, group: Group, kinds: tuple[str, ...]) -> NDArray[np.intp]:
    """Return how many events of these kinds each exit's segment holds."""
    total = np.zeros(len(group), np.intp)
    for kind in kinds:
        if class_of_kind(kind) in CLASS:
            total += batch.segment_counts(class_of_kind(kind))[batch.exits.seg[group]]
        if kind == "kvm_emulate_insn":
            total -= failed_segments(batch)[batch.exits.seg[group]]
    return total


def _check_must(batch: Batch, group: Group, known: NDArray[np.bool_], must: Must) -> None:
    least, most = must.count
    if not batch.recorded(*must.events):  # an alternative that was not recorded may have been the one
        batch.findings.check("V4", 0, len(group))
        return
    found = _occurrences(batch, group, must.events)
    wrong = known & (found < least)
    if most is not None:
        # an injection pass may decode the instruction that it injects (soft events on SVM without NRIPS)
        own = (batch.exits.mask[group] & _INJECTIONS) == 0
        wrong |= known & (found > most) & (own | ("kvm_emulate_insn" not in must.events))
    at = np.flatnonzero(wrong)
    at = at[~any_holds(must.unless, batch, group[at])]
    batch.findings.check("V4", np.count_nonzero(known), np.count_nonzero(~known))
    bad = group[at]

    def describe(i: int) -> tuple[str, str]:
        times = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        return (f"{times} of {' or '.join(must.events)} after {exit_name(batch, int(bad[i]))}", f"{int(found[at[i]])}")

    batch.findings.violate("V4", batch.exits.start[bad], describe)


def _check_forbidden(batch: Batch, group: Group, row: ExitExpectation) -> None:
    mask = batch.exits.mask[group]
    stray = mask & FOLLOW_UP_MASK & ~allowed_mask(row)
    # soft events injected on SVM without NRIPS are decoded by the emulator, in the injection pass
    injected = ((mask & _INJECTIONS) != 0) & (batch.exits.isa[group] == ISA_SVM)
    stray &= ~np.where(injected, _EMULATE, np.uint64(0))
    rule = "J7" if (int(batch.exits.isa[group[0]]), row.code) in INTERRUPT_WINDOWS else "V13"
    batch.findings.check(rule, len(group))
    bad = group[stray != 0]
    strays = stray[stray != 0]

    def describe(i: int) -> tuple[str, str]:
        allowed = [CLASS_NAMES[c] for c in range(64) if int(allowed_mask(row)) >> c & 1]
        found = [CLASS_NAMES[c] for c in range(64) if int(strays[i]) >> c & 1]
        return (f"after {exit_name(batch, int(bad[i]))}: {', '.join(allowed) or 'no follow-up'}", ", ".join(found))

    batch.findings.violate(rule, batch.exits.start[bad], describe)
