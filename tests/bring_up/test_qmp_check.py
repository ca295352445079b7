"""QEMU's own word beside the trace; its answers come out of a file and are not trusted."""

from __future__ import annotations

import pytest

from kvmtrace.bring_up.followed import KvmObject
from kvmtrace.bring_up.qmp_answers import check_qmp

VCPU = KvmObject("vm0.vcpu0", "vcpu", "vm0", 5, 0, 7, 0, "struct vcpu_vmx", "kvm_vcpu_fops", run_tids=(8,))
ANSWERS = {
    "version": {"qemu": {"major": 7, "minor": 2, "micro": 1}},
    "kvm": {"enabled": True, "present": True},
    "cpus": [{"cpu-index": 0, "thread-id": 8}],
    "accel_types": [{"name": "kvm-accel", "parent": "accel"}],
    "cpu_types": [{"name": "host-x86_64-cpu", "parent": "max-x86_64-cpu"}],
}


def test_agreement() -> None:
    made = check_qmp(ANSWERS, [VCPU])
    assert made is not None
    assert made.differed == ()
    assert len(made.agreed) == 4
    assert made.version == "7.2.1"
    assert made.threads == {0: 8}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cpus": [{"cpu-index": 0, "thread-id": 9}]}, "thread 9"),
        ({"kvm": {"enabled": False}}, "disabled"),
        ({"accel_types": [{"name": "kvm-accel", "parent": "object"}]}, "kvm-accel"),
    ],
)
def test_differences_are_named(change: dict, word: str) -> None:
    made = check_qmp({**ANSWERS, **change}, [VCPU])
    assert made is not None
    assert any(word in text for text in made.differed)


@pytest.mark.parametrize(
    "answers",
    [
        {"cpus": "x", "kvm": 3, "version": [], "accel_types": [1, None], "cpu_types": {}},
        {"cpus": [{}, 4]},
        {},
        {"kvm": {"enabled": "yes"}, "version": {"qemu": "7"}},
    ],
)
def test_nonsense_is_no_finding(answers: dict) -> None:
    made = check_qmp(answers, [VCPU])
    assert made is not None
    assert made.differed == ()


def test_nobody_asked_and_nobody_answered() -> None:
    assert check_qmp(None, []) is None
    failed = check_qmp({"error": "no such socket"}, [])
    assert failed is not None
    assert failed.error == "no such socket"
