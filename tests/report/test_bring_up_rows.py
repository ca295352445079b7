"""The construction as rows to read: one order, repetitions once, nothing dropped in silence."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from kvmtrace.bring_up.followed import BringUp, Step, VmmStart, VmmStep
from kvmtrace.render.bring_up_rows import ASKED, chosen, outcomes, timeline
from kvmtrace.render.html.bring_up_tables import bring_up_tables
from kvmtrace.render.terminal import Style
from kvmtrace.render.text.bring_up_text import bring_up_sections


def step(at: int, name: str, **more: object) -> Step:
    made = Step(at, at * 100, 10, 7, "ioctl", name, 4, 0, 0, "vm0", "", "ok", "", "")
    return replace(made, **more)  # type: ignore[arg-type]


REFUSED = {"verdict": "explained", "ret": -17, "sentence": "refused with EEXIST: twice", "source": "x86.c"}
BUILT = BringUp(
    (
        step(1, "KVM_CREATE_VM", object="kvm0", makes="vm0"),
        *(step(i, ASKED) for i in range(2, 6)),
        step(6, "KVM_IOEVENTFD"),
        step(7, ASKED),
        step(8, "KVM_IOEVENTFD"),
        step(9, "KVM_IOEVENTFD", tid=8),
        step(10, "KVM_CREATE_IRQCHIP", **REFUSED),
        step(20, "KVM_CREATE_IRQCHIP", object="vm1", **REFUSED),
        step(30, "KVM_CREATE_VCPU", verdict="violation", ret=5, sentence="succeeded, must fail", makes="vm0.vcpu0"),
    ),
    (),
    vmm=VmmStart(
        (
            VmmStep(0, 0, 7, "vmm_accel_init_machine", "", "kvm_init"),
            VmmStep(11, 1100, 7, "vmm_accel_init_machine_return", "ret 0", "ready"),
        ),
        0,
        (),
        (),
    ),
)


def test_vmm_and_kvm_are_one_timeline_and_repetitions_one_row() -> None:
    rows = timeline(BUILT)
    assert [(row.step, row.n) for row in rows] == [
        ("accel_init_machine", 1),
        ("KVM_CREATE_VM", 1),
        ("KVM_IOEVENTFD", 2),
        ("KVM_IOEVENTFD", 1),
        ("KVM_CREATE_IRQCHIP", 1),
        ("accel_init_machine_return (0)", 1),
        ("KVM_CREATE_IRQCHIP", 1),
        ("KVM_CREATE_VCPU", 1),
    ]
    assert rows[0].dur_ns == 1100  # to its probed return
    assert rows[2].dur_ns == 20
    assert [row.ts_ns for row in rows] == sorted(row.ts_ns for row in rows)


def test_landmarks_stay_where_room_is_short() -> None:
    rows = timeline(BUILT)
    kept = chosen(rows, 5)
    assert [row.step for row in kept] == [
        "accel_init_machine",
        "KVM_CREATE_VM",
        "KVM_IOEVENTFD",
        "accel_init_machine_return (0)",
        "KVM_CREATE_VCPU",
    ]
    assert chosen(rows, 99) == rows
    assert chosen(rows, 0) == []


def test_each_outcome_is_told_once_worst_first() -> None:
    told = [(outcome.verdict, outcome.name, outcome.objects, outcome.n) for outcome in outcomes(BUILT)]
    assert told == [
        ("violation", "KVM_CREATE_VCPU", ("vm0",), 1),
        ("explained", "KVM_CREATE_IRQCHIP", ("vm0", "vm1"), 2),
    ]


def test_text_counts_what_it_leaves_out() -> None:
    text = "\n".join(bring_up_sections(SimpleNamespace(bring_up=BUILT, vcpus=()), Style()))  # type: ignore[arg-type]
    assert "5 KVM_CHECK_EXTENSION (--format json)" in text
    assert text.count("refused with EEXIST") == 1
    assert "explained (2 times): KVM_CREATE_IRQCHIP on vm0, vm1 returned -17" in text
    assert "2x KVM_IOEVENTFD" in text


def test_html_sets_the_capabilities_apart() -> None:
    tables = {table.id: table for table in bring_up_tables(BUILT)}
    assert set(tables) == {"steps", "outcomes", "asked"}
    assert len(tables["asked"].rows) == 5
    assert all(ASKED not in cell.text for row in tables["steps"].rows for cell in row)
