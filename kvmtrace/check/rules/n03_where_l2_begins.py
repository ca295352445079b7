"""N3: a nested entry enters L2 where L1 asked for, and with what L1 asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.findings import constant
from kvmtrace.check.guest_levels import chain_owner, nestings
from kvmtrace.check.nested_entries import ENTRY_EVENT, followed_by, preceded_by, switches
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.nesting import ENTERS_L2, REFUSED, TELLS_L2, WITH_ENTRY
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "N3",
    "where L2 begins",
    VIOLATION,
    ("kvm_nested_vmenter.nested_rip", "kvm_entry.rip", "kvm_exit"),
    "Behind a nested entry the vCPU is entered at the RIP that L1 wrote for L2; the instruction that enters L2 enters "
    "it, raises an exception, or is refused visibly, each reason named once.",
    "nested_svm_vmrun, enter_svm_guest_mode, nested_vmcb02_prepare_save (svm/nested.c), nested_vmx_run, "
    "prepare_vmcs02 (vmx/nested.c)",
    places=ENTRY_EVENT,
    healthy="""
(200) kvm_inj_exception: exception=13 has_error=1 error_code=0x0 reinjected=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=24 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1000 nested_rip=0x2000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
kvm_exit: exit_reason=24 guest_rip=0x3000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter_failed: msg=controls err=0
kvm_entry: vcpu_id=0 rip=0x3003
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=24 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1000 nested_rip=0x2000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2007
""",
)
DECODE = "kvm_emulate_insn"
SHORTEST = 3  # bytes of the instructions that enter L2
_REASON = ("msg", "text")  # field with the words, in binary recordings and in text
LONGEST = threshold("longest_instruction")


@RULE.part("L2's RIP")
def _begins(excerpt: Excerpt, found: Found) -> None:
    if not len(excerpt.segments.positions(ENTRY_EVENT)):
        return
    made = switches(excerpt, ENTRY_EVENT)
    wanted = excerpt.sequence.values(ENTRY_EVENT, "nested_rip", made.position).astype(np.uint64)
    bad = np.flatnonzero(wanted != made.rip)
    found.check(len(made.position))
    found.violate(
        excerpt.segments.start[made.entry[bad]],
        lambda i: (
            f"rip {int(wanted[bad[i]]):#x}, L2's as kvm_nested_vmenter says",
            f"rip {int(made.rip[bad[i]]):#x}",
        ),
    )


@RULE.part(
    "L1's RIP at the nested entry",
    needs=("kvm_nested_vmenter.rip", "kvm_exit.guest_rip", "kvm_exit.exit_reason", "kvm_exit.isa"),
    adds=False,
)
def _told(excerpt: Excerpt, found: Found) -> None:
    """Check that kvm_nested_vmenter tells the RIP of the instruction that enters L2, or the one behind it."""
    exits = excerpt.exits
    positions, number = _by_instruction(excerpt)
    told = excerpt.sequence.values(ENTRY_EVENT, "rip", positions).astype(np.uint64)
    moved = (told - exits.get("guest_rip")[number]).view(np.int64)
    good = np.ones(len(positions), bool)
    for nesting, _, mine in nestings(excerpt):
        least, most = (SHORTEST, LONGEST) if nesting.skips_entry else (0, 0)
        good &= ~mine[number] | ((moved >= least) & (moved <= most))
    bad = np.flatnonzero(~good)
    found.check(len(positions))
    found.violate(
        positions[bad],
        lambda i: (
            f"the RIP of {excerpt.exit_name(number[bad[i]])}, or the one behind it, as the ISA has it",
            f"rip {int(told[bad[i]]):#x}",
        ),
    )


def _by_instruction(excerpt: Excerpt) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the nested entries right behind the exit of an instruction that enters L2, and these exits."""
    positions = excerpt.segments.positions(ENTRY_EVENT)
    number = chain_owner(excerpt, positions)
    direct = (number >= 0) & (excerpt.exits.seg[number] == excerpt.segments.of[positions])
    direct &= excerpt.of_kind("nested_entry")[number]
    return positions[direct], number[direct]


@RULE.part(
    "the instruction as KVM decodes it",
    needs=(
        "kvm_nested_vmenter.rip",
        "kvm_exit.guest_rip",
        "kvm_exit.exit_reason",
        "kvm_exit.isa",
        "kvm_emulate_insn.rip",
        "kvm_emulate_insn.len",
        "kvm_emulate_insn.failed",
    ),
    adds=False,
    source="svm_skip_emulated_instruction (svm/svm.c), x86_decode_emulated_instruction (x86.c)",
)
def _decoded(excerpt: Excerpt, found: Found) -> None:
    """Check that an instruction that KVM decodes to step over it is L1's, and as long as L1 then has moved."""
    exits, sequence = excerpt.exits, excerpt.sequence
    positions, number = _by_instruction(excerpt)
    first = excerpt.first_in_exit(DECODE, number)
    at = first >= 0
    positions, number, first = positions[at], number[at], first[at]
    if not len(positions):
        return
    own = exits.get("guest_rip")[number]
    length = sequence.values(DECODE, "len", first).astype(np.uint64)
    rip = sequence.values(DECODE, "rip", first).astype(np.uint64)
    good = (rip == own) & (sequence.values(DECODE, "failed", first) == 0)
    steps = np.zeros(len(positions), bool)
    for nesting, _, mine in nestings(excerpt):
        steps |= mine[number] & nesting.skips_entry
    good &= ~steps | (sequence.values(ENTRY_EVENT, "rip", positions).astype(np.uint64) == own + length)
    bad = np.flatnonzero(~good | (first > positions))
    found.check(len(positions))
    found.violate(
        first[bad],
        lambda i: (
            f"{excerpt.exit_name(number[bad[i]])} at {int(own[bad[i]]):#x}, stepped over before L2 is entered",
            f"{int(length[bad[i]])} bytes at {int(rip[bad[i]]):#x}, or behind the entry",
        ),
    )


@RULE.part(
    "what becomes of a nested entry",
    needs=("kvm_exit.exit_reason", "kvm_exit.isa", REFUSED, "kvm_inj_exception"),
    places=lambda excerpt: int(np.count_nonzero(excerpt.of_kind("nested_entry"))),
    adds=False,
)
def _becomes(excerpt: Excerpt, found: Found) -> None:
    """Check that an exit by which L1 enters L2 does that, or says why not."""
    exits = excerpt.exits
    told = exits.has(*ENTERS_L2) | exits.has(TELLS_L2, REFUSED)
    told |= exits.has("inject exception", "kvm_smm_transition")
    group = np.flatnonzero(excerpt.of_kind("nested_entry") & (exits.resume_rip != 0))
    bad = group[~told[group]]
    found.check(len(group))
    found.violate(
        exits.start[bad],
        lambda i: (
            f"kvm_nested_vmenter, kvm_nested_vmenter_failed or an exception after {excerpt.exit_name(bad[i])}",
            "VM-entry without any",
        ),
    )


@RULE.part(
    "what enters L2",
    needs=("kvm_exit.exit_reason", "kvm_exit.isa", "kvm_smm_transition", DECODE),
    places=lambda excerpt: len(_attempts(excerpt)),
    adds=False,
    source="nested_svm_vmrun, svm_leave_smm, gp_interception (svm/svm.c, svm/nested.c); nested_vmx_run, vmx_leave_smm "
    "(vmx/nested.c, vmx/vmx.c)",
)
def _causes(excerpt: Excerpt, found: Found) -> None:
    """Check that L2 is entered, or refused, behind an instruction that enters it, or as SMM is left."""
    positions, exits = _attempts(excerpt), excerpt.exits
    if not len(positions):
        return
    # the VMM may set a state in which L2 runs, or one that is refused
    may = np.ones(len(excerpt.segments), bool)
    # the instruction may be intercepted as the exception that it would raise, and then be decoded
    decoded = excerpt.of_kind("exception") & exits.has(DECODE)
    may[exits.seg] = excerpt.of_kind("nested_entry") | exits.chain_has("kvm_smm_transition") | decoded
    stray = positions[~may[excerpt.segments.of[positions]]]
    found.check(len(positions))
    found.violate(stray, constant("an instruction that enters L2, or the end of SMM, before", "another exit"))


def _attempts(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return where L2 is entered or refused."""
    events = (*ENTERS_L2, REFUSED)
    return np.sort(np.concatenate([excerpt.segments.positions(event) for event in events]))


@RULE.part(
    "why an entry is refused",
    needs=(REFUSED, "kvm_exit"),
    places=REFUSED,
    adds=False,
    source="KVM_NESTED_VMENTER_CONSISTENCY_CHECK (x86.h); nested_vmx_check_vmentry_hw (vmx/nested.c)",
)
def _why(excerpt: Excerpt, found: Found) -> None:
    """Check that a refusal gives each reason once."""
    positions = excerpt.segments.positions(REFUSED)
    told = next((name for name in _REASON if excerpt.has_field(REFUSED, name)), "")
    reason = excerpt.sequence.values(REFUSED, told, positions) if told else np.zeros(0)
    if not len(positions) or reason.dtype.kind != "S":
        return
    # a check within a check says why as well, in other words
    owner = excerpt.segments.of[positions]
    again = np.flatnonzero((owner[1:] == owner[:-1]) & (reason[1:] == reason[:-1])) + 1
    found.check(len(positions))
    found.violate(positions[again], constant("one kvm_nested_vmenter_failed for each reason", "the same reason again"))


@RULE.part("what L1 asked for", needs=("kvm_nested_intercepts", "kvm_exit.isa"), adds=False)
def _with_intercepts(excerpt: Excerpt, found: Found) -> None:
    """Check that the intercepts are traced with each nested entry, directly behind it, on ISAs that trace them."""
    entries, words = excerpt.segments.positions(ENTRY_EVENT), excerpt.segments.positions(WITH_ENTRY)
    if not any(nesting.intercepts for nesting, _, _ in nestings(excerpt)):
        return
    follows, told = followed_by(excerpt, entries, WITH_ENTRY)
    precedes, known = preceded_by(excerpt, words, ENTRY_EVENT)
    lone, stray = entries[told & ~follows], words[known & ~precedes]
    found.check(np.count_nonzero(told), np.count_nonzero(~told))
    found.violate(lone, constant("kvm_nested_intercepts directly behind kvm_nested_vmenter", "another event"))
    found.violate(stray, constant("kvm_nested_intercepts directly behind kvm_nested_vmenter", "elsewhere"))
