"""The faults as data, and how they are applied to a source."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from faults.arm64_catalogue import ARM64_FAULTS
from faults.catalogue import FAULTS, Fault, apply_fault
from faults.nested import NESTED_FAULTS
from kvmtrace.check.findings import handler_of
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.workload.arm64_guests import ARM64_GUESTS

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """\
static int grow(struct vcpu *vcpu, int by);
/* int grow(int) is described elsewhere */
static int shrink(struct vcpu *vcpu)
{
\tvcpu->size = vcpu->size + 1;
\treturn 1;
}

static int grow(struct vcpu *vcpu, int by)
{
\tif (by) {
\t\tvcpu->size = vcpu->size + by;
\t}
\treturn 1;
}

static int last(void)
{
\treturn 2;
}
"""
FAULT = Fault(
    "grow-twice",
    "svm",
    "kvm/x.c",
    "static int grow",
    r"vcpu->size \+ by;",
    "vcpu->size + by + by;",
    (),
    frozenset({"V6"}),
    "It grows twice.",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a directory with one source file."""
    (tmp_path / "kvm").mkdir()
    (tmp_path / "kvm" / "x.c").write_text(SOURCE)
    return tmp_path


def test_one_line_changes_in_the_definition(source: Path) -> None:
    apply_fault(source, FAULT)
    changed = (source / "kvm" / "x.c").read_text()
    assert changed == SOURCE.replace("vcpu->size + by;", "vcpu->size + by + by;")


@pytest.mark.parametrize(
    "fault",
    [
        replace(FAULT, function="static int wither"),
        replace(FAULT, pattern="return 2;"),
        replace(FAULT, pattern="vcpu"),
    ],
    ids=["no function", "other function's line", "many matches"],
)
def test_what_does_not_fit_is_refused(source: Path, fault: Fault) -> None:
    with pytest.raises(ValueError, match=r"kvm/x\.c"):
        apply_fault(source, fault)
    assert (source / "kvm" / "x.c").read_text() == SOURCE


def test_the_catalogue_covers_both_isas() -> None:
    assert len({fault.name for fault in ALL}) == len(ALL) >= 6
    for isa in ("vmx", "svm"):
        assert sum(fault.isa == isa for fault in FAULTS) >= 3
    for fault in ALL:
        assert fault.rules
        assert fault.rules <= set(all_rules())
        assert "\n" not in fault.replacement
        assert fault.what.endswith(".")


ALL = (*FAULTS, *NESTED_FAULTS)
# the faults of the lab, and the VM-exit in whose wake each shows; those without one are KVM_RUN's own
EXIT_OF_FAULT = {
    "vmx-cpuid-skips-a-byte-more": (1, 10),
    "svm-in-skips-a-byte-more": (2, 0x7B),
    "halt-reported-as-signal": (2, 0x78),
    "gp-forgotten": (1, 32),
    "nested-l2-goes-on-elsewhere": (2, 0x7C),
    "nested-entry-not-skipped": (2, 0x80),
    "nested-delivery-lost": (2, 0x4B),
}


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_the_function_of_a_lab_fault_can_be_named(fault: Fault) -> None:
    """The sources of its rules, and of their parts, with the exit's handler."""
    sources = [handler_of(*EXIT_OF_FAULT[fault.name])] if fault.name in EXIT_OF_FAULT else []
    for name in fault.rules:
        rule = all_rules()[name]
        sources += [rule.source, *(part.source for part in rule.parts)]
    function = fault.function.rsplit(" ", maxsplit=1)[-1].removesuffix("_noskip")
    assert any(function in source for source in sources), (function, sources)


def test_arm64s_faults_are_seen_or_it_is_said_why_not() -> None:
    assert len({fault.name for fault in ARM64_FAULTS}) == len(ARM64_FAULTS) >= 20
    assert sum(bool(fault.rules) for fault in ARM64_FAULTS) >= 12
    for fault in ARM64_FAULTS:
        assert "{on}" in fault.edit.replacement
        assert fault.guest in ARM64_GUESTS
        assert fault.rules <= set(all_rules())
        assert bool(fault.rules) != bool(fault.why_not)
        assert fault.what.endswith(".")
