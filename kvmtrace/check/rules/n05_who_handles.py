"""N5: an exit of L2 is KVM's or L1's, as the ISA and L1's own intercepts say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.guest_levels import nestings
from kvmtrace.check.reflections import asked_for, exits_of_l2, has_before, passed_on, reflections
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.nesting import REFLECTS, TELLS_L2
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.reflections import Reflections
    from kvmtrace.check.rule import Found

    Mask = NDArray[np.bool_]

RULE = Rule(
    "N5",
    "who handles an exit of L2",
    VIOLATION,
    (
        "kvm_nested_vmexit",
        "kvm_nested_vmexit_inject.exit_code",
        "kvm_nested_vmenter|kvm_nested_vmrun",
        "kvm_exit.exit_reason",
        "kvm_exit.isa",
    ),
    "KVM keeps the exits of L2 that are the host's, passes on those that L1 gets by definition or has asked for, and "
    "nothing else; what it makes up for L1 has a cause.",
    "svm_handle_exit (svm/svm.c), nested_svm_exit_special, nested_svm_intercept, nested_svm_exit_handled_msr, "
    "nested_svm_intercept_ioio (svm/nested.c); nested_vmx_l0_wants_exit, nested_vmx_l1_wants_exit "
    "(vmx/nested.c)",
    "exits that a bitmap or a control field of L1 decides which the events do not tell",
    places=TELLS_L2,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 exit_int_info_err=0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
kvm_exit: exit_reason=24 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1000 nested_rip=0x2000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=24 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmenter: rip=0x1000 nested_rip=0x2000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x2000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x2002
kvm_exit: exit_reason=10 guest_rip=0x2002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x2002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 exit_int_info_err=0 isa=1
kvm_entry: vcpu_id=0 rip=0x3000
""",
)


@RULE.part("what L1 gets")
def _given(excerpt: Excerpt, found: Found) -> None:
    """Check that exits which L1 gets by definition, or which it asked for, are passed on as they are."""
    group = exits_of_l2(excerpt)
    if not len(group):
        return
    code, direct = excerpt.exits.code[group], passed_on(excerpt)[group]
    asked, known = asked_for(excerpt, excerpt.exits.start[group], code)
    wrong, judged = np.zeros(len(group), bool), np.zeros(len(group), bool)
    for nesting, _, mine in nestings(excerpt):
        own = mine[group]
        kept = [code for code, names in nesting.unless.items() if _seen(excerpt, names)]
        given = among(code, [*nesting.given]) & ~among(code, kept)
        open_ = among(code, [*nesting.kept, *nesting.may_be_given, *kept])
        judged |= own & (given | (known & ~open_) | among(code, [*nesting.kept]))
        wrong |= own & ~direct & (given | (known & asked & ~open_))
    bad = group[wrong]
    found.check(np.count_nonzero(judged), np.count_nonzero(~judged))
    found.violate(
        excerpt.exits.start[bad],
        lambda i: (f"{excerpt.exit_name(bad[i])} of L2 passed on to L1, which gets it or asked for it", "KVM kept it"),
    )


def _seen(excerpt: Excerpt, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in excerpt.capability.seen)


@RULE.part("what KVM keeps", places=REFLECTS, adds=False)
def _kept(excerpt: Excerpt, found: Found) -> None:
    """Check that an exit of the host's is not passed on, and none that L1 did not ask for."""
    made = reflections(excerpt)
    if not len(made.position):
        return
    asked, known = asked_for(excerpt, made.position, made.code)
    refused = known & ~asked
    wrong = np.zeros(len(made.position), bool)
    for nesting, _, mine in nestings(excerpt):
        own = mine[made.exit]
        wrong |= own & (refused & ~among(made.code, [*nesting.unasked]) | among(made.code, [*nesting.hidden]))
    found.check(len(made.position))
    _report(excerpt, made.take(wrong), "an exit that L1 asked for", found)


@RULE.part("causes", places=REFLECTS, adds=False)
def _caused(excerpt: Excerpt, found: Found) -> None:
    """Check that an exit of L1 that was no exit of L2's, or that KVM handled first, has its cause before it."""
    made = reflections(excerpt)
    if not len(made.position):
        return
    for nesting, isa, mine in nestings(excerpt):
        own = made.take(mine[made.exit])
        plain = (own.raw & ~isa.code_mask & 0xFFFFFFFF) == 0  # others are another interface's: Hyper-V makes its own
        other = own.code != own.own
        for first, table in ((~other & among(own.code, [*nesting.kept]), nesting.kept), (other, nesting.invented)):
            chosen = own.take(first & plain)
            known = among(chosen.code, list(table))
            if table is nesting.invented:
                found.check(len(chosen.position))
                _report(excerpt, chosen.take(~known), "an exit that KVM makes for L1", found)
            for code, events in table.items():
                _check_cause(excerpt, chosen.take(chosen.code == code), events, found)


def _check_cause(excerpt: Excerpt, made: Reflections, events: str, found: Found) -> None:
    names = events.split("|") if events else []
    if not names or not len(made.position) or not excerpt.recorded(*names):
        return
    there: Mask = np.zeros(len(made.position), bool)
    for name in names:
        there |= has_before(excerpt, made, name)
    _report(excerpt, made.take(~there), f"{' or '.join(names)} before", found)


def _report(excerpt: Excerpt, made: Reflections, expected: str, found: Found) -> None:
    found.violate(
        made.position,
        lambda i: (
            f"{expected} (behind {excerpt.exit_name(made.exit[i])})",
            f"kvm_nested_vmexit_inject of {_name(excerpt, made, i)}",
        ),
    )


def _name(excerpt: Excerpt, made: Reflections, i: int) -> str:
    isa = excerpt.isa_of(made.exit[i : i + 1])
    return isa.describe(int(made.raw[i]))
