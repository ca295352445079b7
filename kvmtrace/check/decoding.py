"""Instructions that the emulator decoded, per segment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT
from kvmtrace.check.batch import EXPECTATIONS
from kvmtrace.check.findings import constant
from kvmtrace.check.instruction_bytes import CS_L, is_string
from kvmtrace.check.mmio_chain import MMIO_WRITE
from kvmtrace.isa.exit_reasons import ISA_SVM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch


IO_EXIT = 0x7B  # EXITINFO2 tells the next RIP even without NRIPS
NO_NRIPS_LEAST, NO_NRIPS_SHARE = 16, 50


def failed_segments(batch: Batch) -> NDArray[np.bool_]:
    """Say which segments hold a decode that failed; it is traced a second time, with `failed` set."""
    return batch.once("failed segments", _failed_segments)


def _failed_segments(batch: Batch) -> NDArray[np.bool_]:
    marked = np.zeros(len(batch.segments), bool)
    if batch.has_field("kvm_emulate_insn", "failed"):
        positions = batch.segments.positions("kvm_emulate_insn")
        bad = batch.sequence.values("kvm_emulate_insn", "failed", positions) != 0
        marked[batch.segments.of[positions[bad]]] = True
    return marked


def check_decoding(batch: Batch) -> None:
    """Check V4: an exit decodes one instruction, and without NRIPS every skipped instruction is decoded."""
    if batch.recorded("kvm_emulate_insn") and batch.has_field("kvm_emulate_insn", "rip"):
        _check_repeated(batch)
        if batch.has_field("kvm_exit", "guest_rip") and batch.has_field("kvm_entry", "rip"):
            _check_skips(batch)
        _check_repeated_write(batch)


def _check_repeated(batch: Batch) -> None:
    """Report an instruction that one exit decodes twice.

    Legal are soft events injected on SVM without NRIPS, and the emulation of invalid guest state on VMX
    (real mode and switches to it, on hosts without unrestricted guest).
    """
    exits, segments, sequence = batch.exits, batch.segments, batch.sequence
    twice = decodes(batch)[exits.seg] > 1
    twice &= ~((exits.isa == ISA_SVM) & exits.has("inject interrupt", "inject exception"))
    positions = segments.positions("kvm_emulate_insn")
    rip = sequence.values("kvm_emulate_insn", "rip", positions)
    owner = segments.of[positions]
    again = np.zeros(len(positions), bool)
    again[1:] = (owner[1:] == owner[:-1]) & (rip[1:] == rip[:-1])
    if batch.has_field("kvm_emulate_insn", "flags"):
        long_mode = sequence.values("kvm_emulate_insn", "flags", positions) & CS_L != 0
        number = np.minimum(np.searchsorted(exits.seg, owner), max(len(exits) - 1, 0))
        again &= long_mode | (exits.isa[number] == ISA_SVM) if len(exits) else False
    if batch.has_field("kvm_emulate_insn", "failed"):
        again &= sequence.values("kvm_emulate_insn", "failed", positions) == 0
    marked = np.full(len(segments), -1, np.intp)
    marked[owner[again]] = positions[again]
    bad = np.flatnonzero(twice & ~batch.nested & (marked[exits.seg] >= 0))
    batch.findings.violate(
        "V4",
        marked[exits.seg[bad]],
        constant("one kvm_emulate_insn: the handler decodes an instruction once", "the same instruction again"),
    )


def _check_skips(batch: Batch) -> None:
    """Report skipped instructions that were not decoded, on SVM hosts that must decode to skip."""
    exits = batch.exits
    skips = np.zeros(len(exits), bool)
    for number, group in batch.groups.items():
        row = EXPECTATIONS[number]
        if row is not None and "emulated_length" in row.checks and row.code != IO_EXIT:
            skips[group] = True
    skips &= (exits.isa == ISA_SVM) & (exits.next_kind == ENTRY)
    skips &= exits.resume_rip != exits.get("guest_rip")
    skips &= ~exits.has("inject exception", "kvm_smm_transition")
    decoded = exits.has("kvm_emulate_insn")
    with_decode, without = np.count_nonzero(skips & decoded), np.count_nonzero(skips & ~decoded)
    if with_decode < NO_NRIPS_LEAST or without * NO_NRIPS_SHARE > with_decode:
        return
    bad = np.flatnonzero(skips & ~decoded)
    batch.findings.check("V4", with_decode + without)
    batch.findings.violate(
        "V4",
        exits.start[bad],
        constant("kvm_emulate_insn: this host decodes every instruction to skip it (no NRIPS)", "none"),
    )


def _check_repeated_write(batch: Batch) -> None:
    """Report an MMIO write that one instruction, no string instruction, does twice."""
    if not batch.recorded("kvm_mmio") or not batch.has_field("kvm_mmio", "gpa"):
        return
    segments, sequence = batch.segments, batch.sequence
    positions = segments.positions("kvm_mmio")
    owner = segments.of[positions]
    same = np.zeros(len(positions), bool)
    same[1:] = (owner[1:] == owner[:-1]) & (sequence.values("kvm_mmio", "type", positions[1:]) == MMIO_WRITE)
    for name in ("gpa", "len", "type"):
        value = sequence.values("kvm_mmio", name, positions)
        same[1:] &= value[1:] == value[:-1]
    positions, owner = positions[same], owner[same]
    insn = segments.first_in("kvm_emulate_insn")[owner]
    once = (insn >= 0) & (segments.kind[owner] == EXIT) & (segments.counts("kvm_emulate_insn")[owner] == 1)
    positions, insn = positions[once], insn[once]
    code = sequence.values("kvm_emulate_insn", "insn", insn)
    plain = [not is_string(bytes(row))[1] for row in code]
    batch.findings.violate(
        "V4",
        positions[np.array(plain, bool)],
        constant("one kvm_mmio write: the instruction writes once", "the same write again"),
    )


def decodes(batch: Batch) -> NDArray[np.intp]:
    """Return how many instructions each segment decodes, second traces of failed ones not counted."""
    return batch.once("decodes", lambda _: batch.segment_counts("kvm_emulate_insn") - failed_segments(batch))
