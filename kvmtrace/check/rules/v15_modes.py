"""V15: a vCPU's modes: system-management mode begins and ends in turn, and a start-up message starts at RIP 0."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT
from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.rip_continuity import MAX_INSTRUCTION
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.starting_vcpus import ENTERED, FORGET, INIT, SIPI, started_vcpus, starting_events
from kvmtrace.check.system_management import system_management
from kvmtrace.check.userspace_changes import setter_rows
from kvmtrace.model.injection import RESET_RIPS, SMI_RIP
from kvmtrace.model.userspace_actions import MODE_SETTERS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

    Positions = NDArray[np.intp]

RULE = Rule(
    "V15",
    "modes",
    VIOLATION,
    ("kvm_entry", "kvm_exit"),
    "System-management mode begins at offset 0x8000 of SMBASE, and ends before it begins again, with the same SMBASE; "
    "a vCPU that got INIT and then a start-up message goes on at RIP 0, and no vCPU does so, or at its reset vector, "
    "without them.",
    "enter_smm, kvm_smm_changed (x86.c, smm.c); kvm_apic_accept_events, kvm_vcpu_deliver_sipi_vector (lapic.c, x86.c)",
    "what the guest's handler changes in the saved state, and causes of SMIs in recordings that do not hold the VM's "
    "creation or the whole machine",
    places="kvm_smm_transition",
    blames_handler=False,
    healthy="""
sys_enter_ioctl: fd=0x8 cmd=0xae80 arg=0x0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_smm_transition: vcpu_id=0 smbase=30000 entering=1
kvm_entry: vcpu_id=0 rip=0x8000
kvm_exit: exit_reason=0 guest_rip=0x8000 isa=1 info1=0x0 info2=0x0 intr_info=0x80000306 vcpu_id=0
kvm_emulate_insn: rip=8000 csbase=30000 len=2 insn=ARRAY[0f, aa] flags=0 failed=0
kvm_smm_transition: vcpu_id=0 smbase=30000 entering=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
sys_enter_ioctl: fd=0x8 cmd=0xae80 arg=0x0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_smm_transition: vcpu_id=0 smbase=30000 entering=1
kvm_entry: vcpu_id=0 rip=0x8000
kvm_exit: exit_reason=1 guest_rip=0x8000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_smm_transition: vcpu_id=0 smbase=30000 entering=1
kvm_entry: vcpu_id=0 rip=0x8000
""",
)
_ACCEPTED = ("kvm_apic_accept_irq.apicid", "kvm_apic_accept_irq.dm", "kvm_entry.rip", "kvm_entry.vcpu_id")


@dataclass(frozen=True)
class _Mode:
    """What the latest transition of a vCPU told: its direction and SMBASE."""

    entering: bool
    smbase: int


@RULE.part(
    "begins and ends in turn",
    needs=("kvm_smm_transition.entering", "kvm_smm_transition.smbase", "sys_enter_ioctl.cmd|kvm_vcpu_ioctl.cmd"),
)
def _turns(excerpt: Excerpt, found: Found) -> None:
    known: dict[int, _Mode] = excerpt.remember("system-management modes", dict)
    positions = _fresh(excerpt, excerpt.segments.positions("kvm_smm_transition"))
    if not len(positions) and not known:
        return
    sequence = excerpt.sequence
    # at the same place what is forgotten comes first
    events = sorted([*((int(at), False) for at in _forgetting(excerpt)), *((int(at), True) for at in positions)])
    entering = dict(zip(positions.tolist(), sequence.values("kvm_smm_transition", "entering", positions), strict=True))
    smbase = dict(zip(positions.tolist(), sequence.values("kvm_smm_transition", "smbase", positions), strict=True))
    wrong: list[tuple[int, str, str]] = []
    setters = _setters_before(excerpt, np.array([at for at, _ in events], np.intp))
    told: dict[int, int] = {}
    for (at, transition), count in zip(events, setters, strict=True):
        key = sequence.key_of(int(sequence.thread[at]))
        if not transition or told.get(key, 0) != count:
            known.pop(key, None)
        told[key] = count
        if transition:
            now = _Mode(bool(entering[at]), int(smbase[at]))
            before = known.get(key)
            known[key] = now
            found.check(before is not None)
            wrong += _compare(at, before, now)
    n_setters = len(setter_rows(excerpt, MODE_SETTERS))
    for key in [key for key in known if told.get(key, 0) != n_setters]:
        del known[key]
    found.violate([at for at, _, _ in wrong], lambda i: wrong[i][1:])


def _compare(at: int, before: _Mode | None, now: _Mode) -> Iterator[tuple[int, str, str]]:
    """Yield what is wrong with a transition, given the one before."""
    if before is None:
        return
    if before.entering == now.entering:
        word = "begins" if now.entering else "ends"
        yield at, f"system-management mode {'ends' if now.entering else 'begins'} first", f"it {word} again"
    elif before.entering and before.smbase != now.smbase:
        yield at, f"SMBASE {before.smbase:#x}, as where the mode began", f"{now.smbase:#x}"


def _fresh(excerpt: Excerpt, positions: Positions) -> Positions:
    fresh: Positions = positions[~excerpt.sequence.repeated[positions]]
    return fresh


def _forgetting(excerpt: Excerpt) -> Positions:
    """Return where a vCPU may have left the mode untold: events were lost, or it was reset."""
    sequence = excerpt.sequence
    lost = np.flatnonzero(sequence.broken)
    if not excerpt.has_field("kvm_entry", "rip"):
        return lost
    entries = _fresh(excerpt, excerpt.segments.positions("VM-entry"))
    reset = entries[among(sequence.values("kvm_entry", "rip", entries).astype(np.int64), tuple(RESET_RIPS))]
    return np.concatenate([lost, reset])


def _setters_before(excerpt: Excerpt, positions: Positions) -> list[int]:
    """Return how many requests, of any thread, that may set modes came before each position."""
    rows = setter_rows(excerpt, MODE_SETTERS)
    counts: list[int] = np.searchsorted(rows, excerpt.sequence.row[positions]).tolist()
    return counts


@RULE.part("where it begins", needs=("kvm_smm_transition.entering", "kvm_entry.rip"), adds=False)
def _first_rip(excerpt: Excerpt, found: Found) -> None:
    """Check that where the last transition before a VM-entry begins the mode, the entry is at 0x8000."""
    segments, sequence = excerpt.segments, excerpt.sequence
    positions = segments.positions("kvm_smm_transition")
    owner = segments.of[positions]
    last = np.append(owner[1:] != owner[:-1], True) if len(owner) else np.zeros(0, bool)
    positions, owner = positions[last], owner[last]
    begins = sequence.values("kvm_smm_transition", "entering", positions) != 0
    loaded = segments.first_in("FPU load")[owner]
    begins &= (segments.next_kind[owner] == ENTRY) & (
        (segments.kind[owner] == EXIT) | ((loaded >= 0) & (loaded < positions))
    )
    entry = segments.start[owner[begins] + 1]
    rip = sequence.values("kvm_entry", "rip", entry).astype(np.uint64)
    at = np.flatnonzero(rip != SMI_RIP)
    found.check(len(entry))
    found.violate(
        entry[at],
        lambda i: (f"rip {SMI_RIP:#x} of SMBASE: system-management mode begins", f"rip {int(rip[at[i]]):#x}"),
    )


# what system_management follows
_FOLLOWED = (
    "kvm_smm_transition.entering",
    "kvm_smm_transition.vcpu_id",
    "kvm_apic_accept_irq.apicid",
    "kvm_apic_accept_irq.dm",
    "kvm_exit.vcpu_id",
)


@RULE.part(
    "causes",
    needs=(*_FOLLOWED, "sys_enter_ioctl.cmd|kvm_vcpu_ioctl.cmd"),
    adds=False,
    source="process_smi, kvm_check_and_inject_events (x86.c)",
)
def _causes(excerpt: Excerpt, found: Found) -> None:
    """Check that each beginning of system-management mode has an SMI."""
    followed = system_management(excerpt)
    found.check(followed.n_judged)
    report_when_certain(excerpt, found, "causes of SMM", followed.uncaused, unless=lambda _: not followed.causes_hold)


@RULE.part(
    "effects",
    needs=(*_FOLLOWED, "sys_enter_ioctl.cmd", "kvm_inj_virq", "kvm_inj_exception"),
    adds=False,
    source="process_smi, kvm_check_and_inject_events (x86.c)",
)
def _effects(excerpt: Excerpt, found: Found) -> None:
    """Check that an SMI that a vCPU sent itself, or that userspace set, begins the mode at the next VM-entry."""
    followed = system_management(excerpt)
    report_when_certain(
        excerpt, found, "effects of SMIs", followed.without, unless=lambda one: not followed.effects_hold(excerpt, one)
    )


@RULE.part("start-up messages", needs=_ACCEPTED, adds=False)
def _start_up(excerpt: Excerpt, found: Found) -> None:
    """Check that a vCPU that waits, as INIT made it, goes on at RIP 0 once a start-up message arrived."""
    # vCPU -> RIPs at which it was entered since the message; None: there was none yet
    waiting: dict[int, list[int] | None] = excerpt.remember("vCPUs that wait for a start-up message", dict)
    if not waiting and not started_vcpus(excerpt):
        return
    times = Counter(excerpt.vcpu_ids.values())  # two VMs may have one of the same number
    wrong: list[tuple[int, int]] = []
    for row, what, vcpu, rip in starting_events(excerpt):
        if what == FORGET:
            waiting.clear()
        elif what == INIT and times.get(vcpu, 0) < 2:
            waiting[vcpu] = None
        elif what == SIPI and vcpu in waiting:
            waiting[vcpu] = []
        elif what == ENTERED and vcpu in waiting:
            rips = waiting[vcpu]
            # the entry under way when INIT came may be traced behind the message: one of two is at 0
            if rips is not None and rip and not rips:
                rips.append(rip)
                continue
            found.check(rips is not None)
            wrong += [(row, rips[0])] if rips and rip else []
            del waiting[vcpu]
    found.violate_rows(
        np.array([row for row, _ in wrong], np.intp),
        lambda i: ("rip 0 before: the vCPU got INIT and a start-up message", f"rip {wrong[i][1]:#x}"),
    )


@RULE.part("resets", needs=(*_ACCEPTED, "kvm_exit.guest_rip", "kvm_emulate_insn"), adds=False)
def _resets(excerpt: Excerpt, found: Found) -> None:
    """Check that a vCPU that goes on at a reset's RIP, not by stepping there, got INIT or a start-up message."""
    exits = excerpt.exits
    told: set[int] = excerpt.remember("started vCPUs", set)
    told |= set(started_vcpus(excerpt))
    near = (exits.resume_rip - exits.get("guest_rip")) & np.uint64(0xFFFF)
    group = np.flatnonzero(
        (exits.next_kind == ENTRY)
        & among(exits.resume_rip.astype(np.int64), tuple(RESET_RIPS))
        & (near > MAX_INSTRUCTION)
    )
    if not len(group):
        return
    group = group[~exits.has("kvm_emulate_insn", "kvm_smm_transition")[group] & ~excerpt.nested[group]]
    vcpu = exits.get("vcpu_id")[group].astype(np.int64) if excerpt.has_field("kvm_exit", "vcpu_id") else group[:0]
    bad = group[~among(vcpu, tuple(told))] if len(vcpu) else group[:0]
    found.check(len(vcpu))
    found.violate(
        excerpt.segments.start[exits.seg[bad] + 1],
        lambda i: (
            f"INIT or a start-up message for vCPU {int(exits.get('vcpu_id')[bad[i]])} before",
            f"none, and rip {int(exits.resume_rip[bad[i]]):#x}",
        ),
    )
