"""RIP continuity (V6): where the guest goes on after an exit that KVM handled, by the exit's RIP class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.batch import EXPECTATIONS
from kvmtrace.check.decoding import decodes, failed_segments
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.check.instruction_bytes import ANYWHERE, NAMES, PATCHED, REPEATS, continuations
from kvmtrace.check.predicates import PREDICATE_COLUMNS
from kvmtrace.isa.base import RipClass
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.isa.lengths import LONGEST_USUAL
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.isa.base import ExitExpectation

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]

_U = np.uint64
CLASSES = tuple(RipClass)
SAME, ADVANCE, EMULATED, TRAP, ANY, NEVER = range(len(CLASSES))
MAX_INSTRUCTION = 15
VMGEXIT = 0x403
RESET_RIPS = (0xFFF0, 0x0)  # INIT, SIPI: kvm_vcpu_reset, kvm_vcpu_deliver_sipi_vector
SMI_RIP = 0x8000
VMX_FAULTS, SVM_FAULTS = (0, 48, 49), (0x4E, 0x400)  # #PF, EPT violation and misconfiguration; #PF, NPF


def classes_of(batch: Batch, group: Group, row: ExitExpectation) -> NDArray[np.uint8]:
    """Return the RIP class of each exit of a group, as an index into CLASSES."""
    classes = np.full(len(group), CLASSES.index(row.rip), np.uint8)
    open_ = np.ones(len(group), bool)
    for predicate, rip_class in row.rip_when:
        held = PREDICATE_COLUMNS[predicate](batch, group) & open_
        classes[held] = CLASSES.index(rip_class)
        open_ &= ~held
    decoded = batch.exits.has("kvm_emulate_insn")[group] & (row.rip is not RipClass.NEVER)
    if any(name.startswith("pio_matches") for name in row.checks):  # string I/O, decode recorded or not
        decoded = decoded | PREDICATE_COLUMNS["string"](batch, group)
    classes[decoded & (classes != ANY)] = EMULATED
    return classes


def advance(batch: Batch, group: Group, new: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how far RIP moved, taking the wrap of 16-bit and 32-bit instruction pointers into account."""
    old = batch.exits.get("guest_rip")[group]
    moved = (new - old).view(np.int64)
    if not len(moved) or (moved.min() >= 0 and moved.max() <= MAX_INSTRUCTION):
        return moved
    wrap32 = (old >> _U(32) == 0) & (moved < 0)
    moved = np.where(wrap32, moved & 0xFFFFFFFF, moved)
    return np.where((old >> _U(16) == 0) & (moved > MAX_INSTRUCTION), moved & 0xFFFF, moved)


def overridden(batch: Batch, group: Group, new: NDArray[np.uint64]) -> Mask:
    """Say where something else than the exit's handler may have moved RIP."""
    exits = batch.exits
    free = exits.chain_has("kvm_smm_transition")[group] | among(new, RESET_RIPS)
    if not batch.recorded("kvm_smm_transition"):
        free |= new == SMI_RIP
    soft = exits.chain_has("inject exception")[group] & (exits.isa[group] == ISA_SVM)
    soft |= _has_soft_interrupt(batch, group)
    # vm86 injection (kvm_inject_realmode_interrupt): hosts without unrestricted guest
    real = (exits.get("guest_rip")[group] >> _U(16) == 0) & (new >> _U(16) == 0)
    real &= (exits.isa[group] == ISA_VMX) & exits.chain_has("inject interrupt", "inject exception")[group]
    found: Mask = free | soft | real | _encrypted(batch, group)
    return found


def _has_soft_interrupt(batch: Batch, group: Group) -> Mask:
    positions = batch.segments.positions("inject interrupt")
    if not len(positions) or not batch.has_field("kvm_inj_virq", "soft"):
        return np.zeros(len(group), bool)
    soft = batch.sequence.values("kvm_inj_virq", "soft", positions) != 0
    chain = batch.segments.chain
    marked = np.zeros(len(batch.segments) + 1, bool)
    marked[chain[batch.segments.of[positions[soft]]]] = True
    found: Mask = marked[chain[batch.exits.seg[group]]] & (batch.exits.isa[group] == ISA_SVM)
    return found


def _encrypted(batch: Batch, group: Group) -> Mask:
    """SEV-ES hides RIP: such a guest leaves by VMGEXIT."""
    if not np.any((batch.exits.isa == ISA_SVM) & (batch.exits.code == VMGEXIT)):
        return np.zeros(len(group), bool)
    found: Mask = batch.exits.isa[group] == ISA_SVM
    return found


def fits(batch: Batch, group: Group, row: ExitExpectation, new: NDArray[np.uint64]) -> tuple[Mask, Mask]:
    """Say which resumes fit their RIP class, and for which the recording is enough to tell.

    Parameters
    ----------
    new : RIP at which each exit of the group was resumed
    """
    old = batch.exits.get("guest_rip")[group]
    classes = classes_of(batch, group, row)
    moved = advance(batch, group, new)
    same = new == old
    stepped = (moved >= max(row.length, 1)) & (moved <= MAX_INSTRUCTION)
    good = (classes == ANY) | (((classes == SAME) | (classes == TRAP)) & same) | ((classes == ADVANCE) & stepped)
    refused = np.flatnonzero((classes == ADVANCE) & same & ~good)
    if len(refused):
        good[refused] = batch.exits.chain_has("inject exception")[group[refused]]
    told = np.ones(len(group), bool)
    emulated = np.flatnonzero(classes == EMULATED)
    if len(emulated):
        good[emulated], told[emulated] = _emulated_fits(batch, group[emulated], same[emulated], moved[emulated])
    if any(name.startswith("pio_matches") for name in row.checks) and not batch.has_field("kvm_exit", "info1"):
        told[:] = False  # string I/O or not?
    if not batch.recorded("kvm_inj_exception"):
        told &= ~((classes == ADVANCE) & same)
    left = np.flatnonzero(~good)
    if len(left):
        good[left] = overridden(batch, group[left], new[left])
    return good, told


def _emulated_fits(batch: Batch, group: Group, same: Mask, moved: NDArray[np.int64]) -> tuple[Mask, Mask]:
    """Check exits that the emulator handled, or that were fixed and are tried again."""
    first = batch.first_in_exit("kvm_emulate_insn", group)
    decoded = first >= 0
    told = decoded | batch.recorded("kvm_emulate_insn")
    good = same.copy()  # not decoded: the page was mapped, the guest tries again
    at = np.flatnonzero(decoded)
    if len(at):
        good[at] = _decoded_fits(batch, group[at], first[at], same[at], moved[at])
    return good, told


def _decoded_fits(batch: Batch, group: Group, first: NDArray[np.intp], same: Mask, moved: NDArray[np.int64]) -> Mask:
    sequence, kind = batch.sequence, "kvm_emulate_insn"
    if not (batch.has_field(kind, "insn") and batch.has_field(kind, "len")):
        return np.ones(len(group), bool)
    length = sequence.values(kind, "len", first).astype(np.int64)
    flags = sequence.values(kind, "flags", first) if batch.has_field(kind, "flags") else np.zeros(len(group))
    where = continuations(sequence.values(kind, "insn", first), length, flags.astype(np.uint8))
    good: Mask = (where == ANYWHERE) | (moved == length)
    again = np.flatnonzero(same & ~good)
    if len(again):
        good[again] = may_repeat(batch, group[again], where[again])
    failed = failed_segments(batch)[batch.exits.seg[group]]
    # invalid-state emulation goes from instruction to instruction without an entry
    chained = (decodes(batch)[batch.exits.seg[group]] > 1) & ~failed
    good |= chained
    gave_up = np.flatnonzero(failed)
    good[gave_up] = same[gave_up]
    if batch.recorded("kvm_inj_exception"):
        good[gave_up] &= batch.exits.chain_has("inject exception")[group[gave_up]]
    return good


def may_repeat(batch: Batch, group: Group, where: NDArray[np.uint8]) -> Mask:
    """Say where a decoded instruction may legally be tried again.

    REP goes on; hypercalls are patched; an exception was queued; after a page fault, retry_instruction()
    traces the decode and then lets the guest try again, and nothing else was traced.
    """
    exits = batch.exits
    repeats = (where == REPEATS) | (where == PATCHED) | exits.chain_has("inject exception")[group]
    vmx = exits.isa[group] == ISA_VMX
    fault = np.where(vmx, among(exits.code[group], VMX_FAULTS), among(exits.code[group], SVM_FAULTS))
    done = exits.has("kvm_mmio", "kvm_pio", "kvm_msr", "kvm_cpuid", "kvm_apic")[group]
    found: Mask = repeats | (fault & ~done)
    return found


def check_rip(batch: Batch) -> None:
    """Check V6: exits that resume without leaving to userspace."""
    if not (batch.has_field("kvm_exit", "guest_rip") and batch.has_field("kvm_entry", "rip")):
        return
    for number, whole in batch.groups.items():
        row = EXPECTATIONS[number]
        assert row is not None
        group = whole[batch.exits.next_kind[whole] == ENTRY]
        if row.rip is RipClass.NEVER:
            continue  # V7 reports that it resumed at all
        new = batch.exits.resume_rip[group]
        good, told = fits(batch, group, row, new)
        if not batch.recorded("kvm_userspace_exit"):  # the VMM may have run between
            told &= batch.recorded("kvm_fpu") & ~batch.exits.has("FPU unload")[group]
        batch.findings.check("V6", np.count_nonzero(told), np.count_nonzero(~told) + len(whole) - len(group))
        _report(batch, row, group, np.flatnonzero(~good & told))
        _check_usual_length(batch, group[good & told], row)


def _check_usual_length(batch: Batch, group: Group, row: ExitExpectation) -> None:
    """Report suspiciously long instructions (H6)."""
    if not len(group):
        return
    longest = LONGEST_USUAL.get(int(batch.exits.isa[group[0]]), {}).get(row.code)
    if longest is None:
        return
    group = group[~batch.exits.has("kvm_emulate_insn")[group]]
    new = batch.exits.resume_rip[group]
    moved = advance(batch, group, new)
    at = np.flatnonzero((moved > longest) & (moved <= MAX_INSTRUCTION))
    if len(at):
        at = at[~overridden(batch, group[at], new[at])]
    batch.findings.check("H6", len(group))
    bad = group[at]
    batch.findings.violate(
        "H6",
        batch.segments.start[batch.exits.seg[bad] + 1],
        lambda i: (f"{exit_name(batch, int(bad[i]))} is at most {longest} bytes long", f"{int(moved[at[i]])} bytes"),
    )


def _report(batch: Batch, row: ExitExpectation, group: Group, at: NDArray[np.intp]) -> None:
    """Report resumes at the wrong RIP, at the kvm_entry."""
    bad = group[at]
    new = batch.exits.resume_rip[group]
    entries = batch.segments.resume[batch.exits.seg[bad]]

    def describe(i: int) -> tuple[str, str]:
        exit_number = bad[i]
        rip = int(batch.exits.get("guest_rip")[exit_number])
        where = _words(batch, row, bad[i : i + 1])
        return (
            f"after {exit_name(batch, int(exit_number))} at rip {rip:#x}: {where}",
            f"rip {int(new[at[i]]):#x} ({int(new[at[i]]) - rip:+d})",
        )

    batch.findings.violate("V6", batch.segments.start[entries], describe)


def _words(batch: Batch, row: ExitExpectation, one: Group) -> str:
    """Say in words where an exit should have resumed."""
    rip_class = CLASSES[int(classes_of(batch, one, row)[0])]
    if rip_class is RipClass.ADVANCE:
        return f"{max(row.length, 1)} to 15 bytes on, behind the instruction"
    if rip_class is not RipClass.EMULATED:
        return "the same rip"
    first = batch.first_in_exit("kvm_emulate_insn", one)
    if first[0] < 0:
        return "the same rip (nothing was emulated)"
    length = int(batch.sequence.values("kvm_emulate_insn", "len", first)[0])
    code = bytes(batch.sequence.values("kvm_emulate_insn", "insn", first)[0])[:length]
    flags = int(batch.sequence.values("kvm_emulate_insn", "flags", first)[0])
    where = int(
        continuations(np.frombuffer(code.ljust(15, b"\0"), np.uint8)[None], np.array([length]), np.array([flags]))[0]
    )
    return f"{length} bytes on: {code.hex(' ')} goes on {NAMES[where]}"
