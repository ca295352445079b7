"""Comparisons of payloads that exit rows ask for (model.predicates.CHECKS), registered by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import USERSPACE
from kvmtrace.check.exit_conditions import port_access
from kvmtrace.check.instruction_bytes import is_string
from kvmtrace.check.rip_continuity import rip_unwound
from kvmtrace.model.predicates import CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

    Group = NDArray[np.intp]
    Numbers = NDArray[np.uint64]
    Compare = Callable[[Excerpt, Group, Found], None]

_U = np.uint64
REGISTERED: dict[str, Compare] = {}


def comparison(name: str) -> Callable[[Compare], Compare]:
    """Register the function that does a comparison of the exit tables."""
    assert name in CHECKS, name

    def register(compare: Compare) -> Compare:
        REGISTERED[name] = compare
        return compare

    return register


def with_follow_up(excerpt: Excerpt, group: Group, name: str) -> tuple[Group, NDArray[np.intp]]:
    """Return the exits whose segment holds the class, and the position of its first event."""
    first = excerpt.first_in_exit(name, group)
    return group[first >= 0], first[first >= 0]


def report_unequal(
    excerpt: Excerpt, found: Found, event: str, pairs: tuple[Group, NDArray[np.intp]], expected: Numbers
) -> None:
    """Report where a field of the follow-ups is not what the exits say; compared in the field's width.

    Parameters
    ----------
    event : "kind.field"
    pairs : exits, and the position of the follow-up of each
    """
    (kind, _, field), (exits, positions) = event.partition("."), pairs
    told = excerpt.sequence.values(kind, field, positions)
    if told.dtype.itemsize <= 4:
        expected = expected & _U(0xFFFFFFFF)
    told = told.astype(np.uint64)
    at = np.flatnonzero(told != expected)
    found.check(len(exits))
    found.violate(
        positions[at],
        lambda i: (
            f"{kind}.{field} {int(expected[at[i]]):#x}, as {excerpt.exit_name(exits[at[i]])} says",
            f"{int(told[at[i]]):#x}",
        ),
    )


def _pio(excerpt: Excerpt, group: Group) -> tuple[Group, NDArray[np.intp]]:
    """Return exits with their kvm_pio: in the exit's segment, or after userspace completed the read."""
    own, first = with_follow_up(excerpt, group, "kvm_pio")
    rest = group[excerpt.first_in_exit("kvm_pio", group) < 0]
    rest = rest[excerpt.exits.next_kind[rest] == USERSPACE]
    later = excerpt.segments.first_in("kvm_pio")[excerpt.exits.seg[rest] + 1] if len(rest) else rest
    return np.append(own, rest[later >= 0]), np.append(first, later[later >= 0])


@comparison("pio_matches_exit")
def _check_pio(excerpt: Excerpt, group: Group, found: Found) -> None:
    exits, positions = _pio(excerpt, group)
    access = port_access(excerpt, exits)
    for field, expected in (("port", access.port), ("size", access.size), ("rw", access.write)):
        report_unequal(excerpt, found, f"kvm_pio.{field}", (exits, positions), expected.astype(np.uint64))


def compare_field(name: str, kind: str, field: str, word: str) -> None:
    """Register a comparison of one field of a follow-up with one word of kvm_exit."""

    @comparison(name)
    def _compare(excerpt: Excerpt, group: Group, found: Found) -> None:
        if word == "guest_rip":
            group = group[~rip_unwound(excerpt)[group]]
        exits, positions = with_follow_up(excerpt, group, kind)
        report_unequal(excerpt, found, f"{kind}.{field}", (exits, positions), excerpt.exits.get(word)[exits])


compare_field("page_fault_rip", "kvm_page_fault", "guest_rip", "guest_rip")
compare_field("page_fault_error", "kvm_page_fault", "error_code", "info1")
compare_field("page_fault_address", "kvm_page_fault", "fault_address", "info2")
compare_field("emulated_rip", "kvm_emulate_insn", "rip", "guest_rip")


@comparison("msr_direction")
def _msr(excerpt: Excerpt, group: Group, found: Found) -> None:
    decode = excerpt.isa_of(group).decode_msr_write
    assert decode is not None
    exits, positions = with_follow_up(excerpt, group, "kvm_msr")
    write = decode(excerpt.exits.code[exits], excerpt.exits.get("info1")[exits])
    report_unequal(excerpt, found, "kvm_msr.write", (exits, positions), np.asarray(write).astype(np.uint64))


@comparison("cr_matches_exit")
def _cr(excerpt: Excerpt, group: Group, found: Found) -> None:
    decode = excerpt.isa_of(group).decode_cr
    assert decode is not None
    exits, positions = with_follow_up(excerpt, group, "kvm_cr")
    access = decode(excerpt.exits.code[exits], excerpt.exits.get("info1")[exits])
    for field, expected in (("cr", access.register), ("rw", access.write)):
        report_unequal(excerpt, found, f"kvm_cr.{field}", (exits, positions), np.asarray(expected).astype(np.uint64))


@comparison("mmio_matches_page_fault")
def _mmio_page(excerpt: Excerpt, group: Group, found: Found) -> None:
    """Check that the first kvm_mmio lies at the faulting address, or near it if it crosses pages."""
    values = excerpt.sequence.values
    exits, positions = with_follow_up(excerpt, group, "kvm_mmio")
    fault = excerpt.first_in_exit("kvm_page_fault", exits)
    insn = excerpt.first_in_exit("kvm_emulate_insn", exits)
    one = (fault >= 0) & (insn >= 0) & (excerpt.segment_counts("kvm_emulate_insn")[excerpt.exits.seg[exits]] == 1)
    exits, positions, fault, insn = exits[one], positions[one], fault[one], insn[one]
    unique, inverse = np.unique(values("kvm_emulate_insn", "insn", insn), axis=0, return_inverse=True)
    string = np.array([is_string(bytes(row))[1] for row in unique], bool)
    address = values("kvm_page_fault", "fault_address", fault).astype(np.uint64)
    gpa, length = (values("kvm_mmio", name, positions).astype(np.uint64) for name in ("gpa", "len"))
    apart = np.abs((gpa >> _U(12)).astype(np.int64) - (address >> _U(12)).astype(np.int64))
    single = excerpt.segment_counts("kvm_mmio")[excerpt.exits.seg[exits]] == 1
    # within a page the address is exact; shadow paging traces a virtual one
    crosses = ((gpa & _U(0xFFF)) + length >= 0x1000) | ((address & _U(0xFFF)) == 0)
    exact = single & ~crosses & ~excerpt.of_kind("virtual_fault")[exits]
    ok = np.where(exact, gpa == address, apart <= 1) | (string[inverse.ravel()] if len(string) else False)
    at = np.flatnonzero(~ok)
    found.check(len(exits))
    found.violate(
        positions[at],
        lambda i: (f"kvm_mmio at the faulting address {int(address[at[i]]):#x}", f"gpa {int(gpa[at[i]]):#x}"),
    )
