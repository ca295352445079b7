"""N4: behind a reflected exit L1 goes on where its processor would."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.guest_levels import nestings, of_nesting, state_set_between
from kvmtrace.check.nested_entries import ENTRY_EVENT, entry_before, switches
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.isa.shared import NESTED_STRUCTURE
from kvmtrace.model.nesting import REFLECTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.nested_entries import Switches
    from kvmtrace.check.rule import Found

RULE = Rule(
    "N4",
    "where L1 goes on",
    VIOLATION,
    ("kvm_nested_vmexit_inject", "kvm_nested_vmenter", "kvm_entry.rip", "kvm_exit"),
    "Behind a reflected exit L1 goes on behind the instruction that entered L2, or at the exit handler that it named "
    "for L2: always the same until it writes another.",
    "nested_svm_vmexit (svm/nested.c), load_vmcs12_host_state (vmx/nested.c)",
    "a wrong RIP of L1 where L1 may have named another exit handler since the last reflected exit, which with "
    "Hyper-V's enlightened nesting it does in its own memory: such exits count as unknown",
    places=REFLECTS,
    healthy=f"""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=128 guest_rip=0x1000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1003 {NESTED_STRUCTURE}=0x3000 nested_rip=0x2000 int_ctl=0 event_inj=0 isa=2
kvm_nested_intercepts: cr_read=0 cr_write=0 exceptions=0 intercept1=0 intercept2=2 intercept3=0
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=129 guest_rip=0x2000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=129 guest_rip=0x2000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=129 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 isa=2
kvm_entry: vcpu_id=0 rip=0x1003
""",
    broken=f"""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=128 guest_rip=0x1000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1003 {NESTED_STRUCTURE}=0x3000 nested_rip=0x2000 int_ctl=0 event_inj=0 isa=2
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=129 guest_rip=0x2000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=129 guest_rip=0x2000 isa=2 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=129 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 isa=2
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


# told of an enlightened VMCS (Hyper-V's), which L1 writes like any memory: nothing shows that it does (nested_vmx_run)
NO_ADDRESS = np.uint64((1 << 64) - 1)


@RULE.part("behind the instruction", needs=("kvm_nested_vmenter.rip",))
def _behind(excerpt: Excerpt, found: Found) -> None:
    if not len(excerpt.segments.positions(REFLECTS)):
        return
    made = switches(excerpt, REFLECTS)
    mine = of_nesting(excerpt, lambda nesting: nesting.returns)[made.exit]
    entry, known = _entries(excerpt, made)
    found.check(np.count_nonzero(mine & known), np.count_nonzero(mine & ~known))
    at = np.flatnonzero(mine & known)
    bad = at[entry[at] != made.rip[at]]
    _report(excerpt, made, bad, entry, found)


def _entries(excerpt: Excerpt, made: Switches) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return what the last nested entry of each thread told as L1's RIP, and whether it is known."""
    before = entry_before(excerpt, made.position)
    rip = np.zeros(len(before), np.uint64)
    rip[before >= 0] = excerpt.sequence.values(ENTRY_EVENT, "rip", before[before >= 0])
    # of a thread's last nested entry in an earlier excerpt
    memory: dict[int, int] = excerpt.remember("last nested entry", dict)
    known, thread = before >= 0, excerpt.sequence.thread
    known[known] = ~state_set_between(excerpt, before[known], made.position[known])
    for i in np.flatnonzero(before < 0).tolist():
        key = excerpt.sequence.key_of(int(thread[made.position[i]]))
        start = int(np.argmax(thread == thread[made.position[i]]))
        whole = not excerpt.sequence.broken[start : made.position[i] + 1].any()
        since = np.array([start]), made.position[i : i + 1]
        if key in memory and whole and not state_set_between(excerpt, *since)[0]:
            rip[i], known[i] = memory[key], True
    entries = excerpt.segments.positions(ENTRY_EVENT)
    told = excerpt.sequence.values(ENTRY_EVENT, "rip", entries).tolist()
    memory.update((excerpt.sequence.key_of(int(thread[at])), rip) for at, rip in zip(entries, told, strict=True))
    if excerpt.sequence.broken.any():
        memory.clear()
    return rip, known


def _report(excerpt: Excerpt, made: Switches, bad: NDArray[np.intp], wanted: NDArray[np.uint64], found: Found) -> None:
    returns = of_nesting(excerpt, lambda nesting: nesting.returns)[made.exit]
    found.violate(
        excerpt.segments.start[made.entry[bad]],
        lambda i: (
            f"rip {int(wanted[bad[i]]):#x}, "
            + ("behind the instruction that entered L2" if returns[bad[i]] else "L1's exit handler, as before"),
            f"rip {int(made.rip[bad[i]]):#x}",
        ),
    )


@RULE.part(
    "at the exit handler", needs=(f"kvm_nested_vmenter.{NESTED_STRUCTURE}", "kvm_exit.exit_reason", "kvm_exit.isa")
)
def _handler(excerpt: Excerpt, found: Found) -> None:
    """Check that the RIP is that of the reflected exit before, if L1 wrote nothing for L2 between."""
    if not len(excerpt.segments.positions(REFLECTS)):
        return
    made = switches(excerpt, REFLECTS)
    wanted = [(nesting, isa, mine[made.exit]) for nesting, isa, mine in nestings(excerpt) if not nesting.returns]
    for nesting, isa, mine in wanted:
        own = np.flatnonzero(mine)
        rewrites = np.append(0, np.cumsum(np.isin(isa.code(excerpt.exits.raw), list(nesting.rewrites))))
        before = entry_before(excerpt, made.position)
        structure = np.zeros(len(before), np.uint64)
        structure[before >= 0] = excerpt.sequence.values(ENTRY_EVENT, NESTED_STRUCTURE, before[before >= 0])
        broken = np.append(0, np.cumsum(excerpt.sequence.broken))
        order = own[np.lexsort((own, structure[own], excerpt.thread[made.exit[own]]))]
        this, last = order[1:], order[:-1]
        same = (structure[this] == structure[last]) & (before[this] >= 0) & (before[last] >= 0)
        same &= structure[this] != NO_ADDRESS
        same &= excerpt.thread[made.exit[this]] == excerpt.thread[made.exit[last]]
        same &= rewrites[made.exit[this] + 1] == rewrites[made.exit[last] + 1]
        same &= broken[made.position[this]] == broken[made.position[last]]
        same &= ~state_set_between(excerpt, made.position[last], made.position[this])
        this, last = this[same], last[same]
        found.check(len(this), len(own) - len(this))
        differs = made.rip[this] != made.rip[last]
        handler = np.zeros(len(made.rip), np.uint64)
        handler[this] = made.rip[last]
        _report(excerpt, made, this[differs], handler, found)
