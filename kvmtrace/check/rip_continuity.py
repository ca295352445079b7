"""Where the guest may continue after an exit, by the exit's RIP class: shared by V6, H5 and H6."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.decoding import decodes, failed_segments
from kvmtrace.check.excerpt import is_port_access, owed_events
from kvmtrace.check.exit_conditions import holds, needs_of, userspace_fields
from kvmtrace.check.instruction_bytes import ANYWHERE, NAMES, PATCHED, REPEATS, continuations
from kvmtrace.check.userspace_changes import ioctl_kind
from kvmtrace.isa.base import RipClass
from kvmtrace.isa.words import INTR_TYPE_SOFT_INTR, decode_intr_info
from kvmtrace.kvm.userspace_exits import KVM_EXIT_MMIO
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.injection import ASYNCHRONOUS_WITHOUT_CODE, INSTEAD_OF_A_STEP, RESET_RIPS, SMI_RIP, SOFT_VECTORS
from kvmtrace.model.thresholds import threshold
from kvmtrace.model.userspace_actions import EXECUTED_EVENTS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.isa.base import ExitRow

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]

_U = np.uint64
CLASSES = tuple(RipClass)
DECODED = ("kvm_emulate_insn.insn", "kvm_emulate_insn.len", "kvm_emulate_insn.flags")  # what tells of an emulation
SAME, ADVANCE, EMULATED, TRAP, ANY, PENDING, NEVER = range(len(CLASSES))
MAX_INSTRUCTION = threshold("longest_instruction")
_STEPS = (2, 4)  # bytes of an instruction that KVM steps over later, Thumb's short ones included
EMULATION_PREFIX = threshold("emulation_prefix")
_RAISED = "kvm_inj_exception"


def classes_of(excerpt: Excerpt, group: Group, row: ExitRow) -> NDArray[np.uint8]:
    """Return the RIP class of each exit of a group, as an index into CLASSES."""
    classes = np.full(len(group), CLASSES.index(row.rip), np.uint8)
    open_ = np.ones(len(group), bool)
    for predicate, rip_class in row.rip_when:
        held = holds(predicate, excerpt, group) & open_
        classes[held] = CLASSES.index(rip_class)
        open_ &= ~held
    decoded = excerpt.exits.has("kvm_emulate_insn")[group] & (row.rip is not RipClass.NEVER)
    if is_port_access(row):  # string I/O, decode recorded or not
        decoded = decoded | holds("string", excerpt, group)
    classes[decoded & (classes != ANY)] = EMULATED
    return classes


def advance(excerpt: Excerpt, group: Group, new: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how far RIP moved, taking the wrap of 16-bit and 32-bit instruction pointers into account."""
    old = excerpt.exits.get("guest_rip")[group]
    moved = (new - old).view(np.int64)
    if not len(moved) or (moved.min() >= 0 and moved.max() <= MAX_INSTRUCTION):
        return moved
    wrap32 = (old >> _U(32) == 0) & (moved < 0)
    moved = np.where(wrap32, moved & 0xFFFFFFFF, moved)
    return np.where((old >> _U(16) == 0) & (moved > MAX_INSTRUCTION), moved & 0xFFFF, moved)


def overridden(excerpt: Excerpt, group: Group, new: NDArray[np.uint64]) -> Mask:
    """Say where something else than the exit's handler may have moved RIP."""
    exits = excerpt.exits
    free = exits.chain_has("kvm_smm_transition")[group] | among(new, RESET_RIPS)
    if not excerpt.recorded("kvm_smm_transition"):
        free |= new == SMI_RIP
    free &= excerpt.of_isa(lambda isa: "kvm_smm_transition" not in isa.absent)[group]  # a reset of x86
    free |= _unwound(excerpt, group, new) | _may_be_reset(excerpt, group)
    soft = exits.chain_has("inject exception")[group] | _has_soft_interrupt(excerpt, group)
    soft &= excerpt.of_isa(lambda isa: isa.soft_events_move_rip)[group]
    # vm86 injection (kvm_inject_realmode_interrupt): hosts without unrestricted guest
    real = (exits.get("guest_rip")[group] >> _U(16) == 0) & (new >> _U(16) == 0)
    real &= excerpt.of_isa(lambda isa: isa.emulates_real_mode)[group]
    real &= exits.chain_has("inject interrupt", "inject exception")[group]
    found: Mask = free | soft | real | _encrypted(excerpt, group)
    return found


def _may_be_reset(excerpt: Excerpt, group: Group) -> Mask:
    """Say behind which signals the VMM may have reset the vCPU, where its ioctls were not recorded."""
    if ioctl_kind(excerpt) is not None:
        return np.zeros(len(group), bool)
    _, _, errno = userspace_fields(excerpt, group)
    found: Mask = (errno < 0) & excerpt.of_isa(lambda isa: isa.resets_anywhere)[group]
    return found


def rip_unwound(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say behind which exits KVM moved RIP back to the INT n, INT3 or INTO whose delivery they interrupted.

    Source: svm_complete_soft_interrupt (svm/svm.c), after kvm_exit was traced
    """
    info = decode_intr_info(excerpt.exits.vectoring)
    soft = (info.type == INTR_TYPE_SOFT_INTR) | among(info.vector, SOFT_VECTORS)
    found: NDArray[np.bool_] = info.valid & soft & excerpt.of_isa(lambda isa: isa.soft_events_move_rip)
    return found


def _unwound(excerpt: Excerpt, group: Group, new: NDArray[np.uint64]) -> Mask:
    """Say where RIP may have been moved back to an instruction whose event is delivered again."""
    back = (excerpt.exits.get("guest_rip")[group] - new).view(np.int64)
    untold = ~excerpt.tells_vectoring & excerpt.of_isa(lambda isa: isa.soft_events_move_rip)
    found: Mask = (back > 0) & (back <= MAX_INSTRUCTION) & (rip_unwound(excerpt) | untold)[group]
    return found


def _has_soft_interrupt(excerpt: Excerpt, group: Group) -> Mask:
    positions = excerpt.segments.positions("inject interrupt")
    if not len(positions):
        return np.zeros(len(group), bool)
    soft = excerpt.values_or("kvm_inj_virq", "soft", positions, 0) != 0
    chain = excerpt.segments.chain
    marked = np.zeros(len(excerpt.segments) + 1, bool)
    marked[chain[excerpt.segments.of[positions[soft]]]] = True
    found: Mask = marked[chain[excerpt.exits.seg[group]]]
    return found


def _encrypted(excerpt: Excerpt, group: Group) -> Mask:
    """Say whether the guest hides its registers, as its own exit for that shows."""
    return np.full(len(group), bool(excerpt.of_kind("encrypted").any()))


def fits(excerpt: Excerpt, group: Group, row: ExitRow, new: NDArray[np.uint64]) -> Mask:
    """Say which resumes fit their RIP class.

    Parameters
    ----------
    new : RIP at which each exit of the group was resumed
    """
    old = excerpt.exits.get("guest_rip")[group]
    classes = classes_of(excerpt, group, row)
    moved = advance(excerpt, group, new)
    same = new == old
    stepped = (moved >= max(row.length, 1)) & (moved <= MAX_INSTRUCTION)
    good = (classes == ANY) | (((classes == SAME) | (classes == TRAP)) & same) | ((classes == ADVANCE) & stepped)
    refused = np.flatnonzero((classes == ADVANCE) & same & ~good)
    if len(refused):
        good[refused] = excerpt.exits.chain_has("inject exception")[group[refused]]
    pending = np.flatnonzero(classes == PENDING)
    if len(pending):
        good[pending] = _pending_fits(excerpt, group[pending], row, moved[pending], new[pending])
    emulated = np.flatnonzero(classes == EMULATED)
    if len(emulated):
        good[emulated] = _emulated_fits(excerpt, group[emulated], same[emulated], moved[emulated])
    left = np.flatnonzero(~good)
    if len(left):
        good[left] = overridden(excerpt, group[left], new[left])
    fitting: Mask = good
    return fitting


def _pending_fits(
    excerpt: Excerpt, group: Group, row: ExitRow, moved: NDArray[np.int64], new: NDArray[np.uint64]
) -> Mask:
    """Check exits whose step, or exception, is carried out after kvm_entry is traced, or as a KVM_RUN ends.

    Of an MMIO access that left to userspace it is the next KVM_RUN that owes the step.
    """
    exits = excerpt.exits
    between = excerpt.segments.resume[exits.seg[group]] - exits.seg[group] - 1
    _, reason, errno = userspace_fields(excerpt, group)
    owed_later = (reason == KVM_EXIT_MMIO) & (errno >= 0)
    open_ = (between == 0) | (owed_later & (between == 1))
    done: Mask = among(moved, _STEPS)
    is_vector = excerpt.isa_of(group).is_vector
    if not row.length:  # the handler may also have it tried again, or give the guest an exception
        done |= moved == 0
        if is_vector is not None:
            done |= is_vector(new)
    found: Mask = np.where(open_, moved == 0, done)
    return found


def stepped_and_raised(excerpt: Excerpt, group: Group, row: ExitRow, new: NDArray[np.uint64]) -> Mask:
    """Say where the instruction was stepped over and its fault raised as well; only exits resumed without userspace.

    Parameters
    ----------
    new : RIP at which each exit of the group was resumed
    """
    raised = excerpt.segments.positions("inject exception")
    found: Mask = np.zeros(len(group), bool)
    if not len(raised) or not excerpt.has_field(_RAISED, "exception"):
        return found
    vector = excerpt.sequence.values(_RAISED, "exception", raised)
    fresh = excerpt.values_or(_RAISED, "reinjected", raised, 0) == 0
    fresh &= ~among(vector, ASYNCHRONOUS_WITHOUT_CODE) | (excerpt.values_or(_RAISED, "error_code", raised, 0) != 0)
    chain = excerpt.segments.chain
    marked = np.zeros(len(excerpt.segments) + 1, bool)
    marked[chain[excerpt.segments.of[raised[fresh & among(vector, INSTEAD_OF_A_STEP)]]]] = True
    at = np.flatnonzero(marked[chain[excerpt.exits.seg[group]]])
    own, rip = group[at], new[at]
    moved = advance(excerpt, own, rip)
    steps = (classes_of(excerpt, own, row) == ADVANCE) | (row.rip is RipClass.ADVANCE)  # decoded to be stepped over
    found[at] = steps & (moved > 0) & (moved <= MAX_INSTRUCTION)
    return found


@dataclass(frozen=True)
class Portion:
    """Exits of a row whose continuation is told by the same events and fields.

    Parameters
    ----------
    about : a few words
    needs : what tells where they go on
    select : of exits and the RIPs at which they resumed, those that belong to it
    """

    about: str
    needs: tuple[str, ...]
    select: Callable[[Excerpt, Group, NDArray[np.uint64]], Mask]


def portions_of(row: ExitRow) -> Iterator[Portion]:
    """Yield the portions of a row's exits: each exit belongs to one."""
    told = needs_of([name for name, _ in row.rip_when] + (["string"] if is_port_access(row) else []))
    others = partial(_select, row=row, emulated=False, decoded=False)
    yield Portion("where the guest continues", told, partial(others, stays=False))
    yield Portion("instructions that are not stepped over", (*told, "kvm_inj_exception"), partial(others, stays=True))
    if "kvm_emulate_insn" not in row.may | owed_events(row) and row.rip is not RipClass.EMULATED:
        return
    decoded = partial(_select, row=row, emulated=True, decoded=True)
    yield Portion("emulated instructions", DECODED, partial(decoded, stays=False))
    again = (*DECODED, "kvm_inj_exception")
    yield Portion("emulated instructions that are tried again", again, partial(decoded, stays=True))
    untried = partial(_select, row=row, emulated=True, decoded=False)
    yield Portion("accesses that are tried again", (*told, "kvm_emulate_insn"), partial(untried, stays=None))


def _select(
    excerpt: Excerpt,
    group: Group,
    new: NDArray[np.uint64],
    *,
    row: ExitRow,
    emulated: bool,
    decoded: bool,
    stays: bool | None,
) -> Mask:
    chosen: Mask = excerpt.exits.has("kvm_emulate_insn")[group] == decoded
    if stays is None or not decoded:
        classes = classes_of(excerpt, group, row)
        chosen &= (classes == EMULATED) == emulated
    if stays is not None:
        same = new == excerpt.exits.get("guest_rip")[group]
        if not decoded:
            same &= classes == ADVANCE
        chosen &= same == stays
    return chosen


def _emulated_fits(excerpt: Excerpt, group: Group, same: Mask, moved: NDArray[np.int64]) -> Mask:
    """Check exits that the emulator handled, or that were fixed and are tried again."""
    first = excerpt.first_in_exit("kvm_emulate_insn", group)
    good = same.copy()  # not decoded: the page was mapped, the guest tries again
    at = np.flatnonzero(first >= 0)
    if len(at):
        good[at] = _decoded_fits(excerpt, group[at], first[at], same[at], moved[at])
    return good


def _decoded_fits(
    excerpt: Excerpt, group: Group, first: NDArray[np.intp], same: Mask, moved: NDArray[np.int64]
) -> Mask:
    kind = "kvm_emulate_insn"
    length = excerpt.sequence.values(kind, "len", first).astype(np.int64)
    flags = excerpt.sequence.values(kind, "flags", first)
    forced = _behind_prefix(excerpt, group, first)
    moved = moved - np.where(forced, EMULATION_PREFIX, 0)
    same = np.where(forced, moved == 0, same)
    where = continuations(excerpt.sequence.values(kind, "insn", first), length, flags.astype(np.uint8))
    good: Mask = (where == ANYWHERE) | (moved == length)
    again = np.flatnonzero(same & ~good)
    if len(again):
        good[again] = may_repeat(excerpt, group[again], where[again])
    failed = failed_segments(excerpt)[excerpt.exits.seg[group]]
    # invalid-state emulation goes from instruction to instruction without an entry
    good |= (decodes(excerpt)[excerpt.exits.seg[group]] > 1) & ~failed
    gave_up = np.flatnonzero(failed)
    good[gave_up] = same[gave_up] & excerpt.exits.chain_has("inject exception")[group[gave_up]]
    return good


def _behind_prefix(excerpt: Excerpt, group: Group, first: NDArray[np.intp]) -> Mask:
    """Say where emulation began behind the prefix that forces it: handle_ud (x86.c) steps over it first."""
    old = excerpt.exits.get("guest_rip")[group]
    began = excerpt.values_or("kvm_emulate_insn", "rip", first, 0).astype(np.uint64)
    found: Mask = (began - old == _U(EMULATION_PREFIX)) & excerpt.of_kind("undefined_opcode")[group]
    return found


def may_repeat(excerpt: Excerpt, group: Group, where: NDArray[np.uint8]) -> Mask:
    """Say where a decoded instruction may legally be tried again.

    REP goes on; hypercalls are patched; an exception was queued; after a page fault, retry_instruction()
    traces the decode and then lets the guest try again, and nothing else was traced.
    """
    exits = excerpt.exits
    repeats = (where == REPEATS) | (where == PATCHED) | exits.chain_has("inject exception")[group]
    found: Mask = repeats | (excerpt.of_kind("memory_fault")[group] & ~exits.has(*EXECUTED_EVENTS)[group])
    return found


def plain_resumes(excerpt: Excerpt, group: Group) -> Group:
    """Return the exits that resumed directly, with nothing that moves RIP between."""
    exits = excerpt.exits
    usable = (exits.next_kind[group] == ENTRY) & ~exits.has("inject exception", "kvm_smm_transition")[group]
    group = group[usable]
    plain: Group = group[~overridden(excerpt, group, exits.resume_rip[group])]
    return plain


def describe_continuation(excerpt: Excerpt, row: ExitRow, one: Group) -> str:
    """Say in words where an exit should have resumed."""
    rip_class = CLASSES[int(classes_of(excerpt, one, row)[0])]
    if rip_class is RipClass.ADVANCE:
        return f"{max(row.length, 1)} to {MAX_INSTRUCTION} bytes on, behind the instruction"
    if rip_class is RipClass.PENDING and excerpt.exits.next_kind[one[0]] != ENTRY:
        return "behind the instruction, unless it is tried again or the guest is given an exception"
    if rip_class is not RipClass.EMULATED:
        return "the same rip"
    first = excerpt.first_in_exit("kvm_emulate_insn", one)
    if first[0] < 0:
        return "the same rip (nothing was emulated)"
    fields = (excerpt.sequence.values("kvm_emulate_insn", name, first) for name in ("insn", "len", "flags"))
    insn, length, flags = (np.asarray(column) for column in fields)
    where = int(continuations(insn, length.astype(np.int64), flags.astype(np.uint8))[0])
    size = int(length[0])
    return f"{size} bytes on: {bytes(insn[0])[:size].hex(' ')} goes on {NAMES[where]}"
