"""Where the time of a vCPU thread goes, worked out by hand."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.json_document import to_json
from kvmtrace.spans.time_parts import EXIT_PARTS

from .tables import FIELDS, KVM_RUN, Row, Script, TableRecording, make_table, recording

if TYPE_CHECKING:
    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import VcpuRow

HLT, CPUID, IO = 12, 10, 30


def report(rows: list[Row], cuts: tuple[int, ...] = (), **options: object) -> Report:
    return build_report(recording(rows, cuts), ReportOptions(model=False, **options))


def only_vcpu(rows: list[Row]) -> VcpuRow:
    (vcpu,) = report(rows).vcpus
    assert vcpu.budget.total_ns() == vcpu.wall_ns
    return vcpu


def test_guest_and_handler() -> None:
    script = Script()(0, "kvm_entry")
    script(1000, "kvm_exit", exit_reason=CPUID, isa=1)(70, "kvm_entry")(300, "kvm_exit", exit_reason=CPUID, isa=1)
    budget = only_vcpu(script.rows).budget
    assert (budget.guest_ns, budget.handler_ns, budget.unknown_ns) == (1300, 70, 0)
    assert budget.entry_exit_ns is None
    assert budget.preempted_ns is None
    assert budget.halt_poll_ns is None


def test_vmx_probes_bracket_the_entry_and_exit_path() -> None:
    script = Script()(0, "kvm_entry")(100, "kvm_exit", exit_reason=CPUID, isa=1)(10, "vmx_vcpu_run_return")
    script(500, "vmx_vcpu_run")(20, "kvm_entry")(100, "kvm_exit", exit_reason=CPUID, isa=1)
    script(11, "vmx_vcpu_run_return")(500, "vmx_vcpu_run")(22, "kvm_entry")
    budget = only_vcpu(script.rows).budget
    assert (budget.guest_ns, budget.entry_exit_ns, budget.handler_ns) == (200, 10 + 20 + 11 + 22, 1000)


def test_svm_before_6_5_traces_the_exit_behind_the_probes_return() -> None:
    script = Script()(0, "svm_vcpu_run")(5, "kvm_entry")(100, "svm_vcpu_run_return")
    script(30, "kvm_exit", exit_reason=0x72, isa=2)(400, "svm_vcpu_run")(5, "kvm_entry")
    budget = only_vcpu(script.rows).budget
    assert budget.guest_ns == 100
    assert budget.entry_exit_ns == 30 + 5
    assert budget.handler_ns == 400


def test_svm_preempted_between_entry_and_late_exit_is_not_guest_time() -> None:
    script = Script()(0, "kvm_entry")(100, "sched_switch", prev_pid=100, prev_state=0x100, next_pid=1)
    script.rows.append((1_000_600, 0, 1, "sched_switch", {"prev_pid": 1, "prev_state": 1, "next_pid": 100}))
    script(540, "kvm_exit", exit_reason=0x60, isa=2)(10, "kvm_entry")
    budget = only_vcpu(script.rows).budget
    assert (budget.guest_ns, budget.preempted_ns, budget.handler_ns) == (100, 500, 40 + 10)


def test_userspace_between_ioctls() -> None:
    script = Script()(0, "kvm_entry")(100, "kvm_exit", exit_reason=IO, isa=1)(40, "kvm_userspace_exit", reason=2)
    script(3, "sys_exit_ioctl")(600, "sys_enter_ioctl", cmd=KVM_RUN)(7, "kvm_fpu", load=1)(9, "kvm_entry")
    found = report(script.rows)
    budget = found.vcpus[0].budget
    assert (budget.handler_ns, budget.userspace_ns) == (40 + 3 + 7 + 9, 600)
    (row,) = found.userspace_exits
    assert (row.reason, row.name, row.errno, row.count, row.total_ns) == (2, "KVM_EXIT_IO", 0, 1, 600)
    (row,) = found.exits
    assert (row.total_ns, row.kernel_ns, row.userspace_ns, row.waiting_ns, row.to_userspace) == (659, 59, 600, None, 1)


def test_other_ioctls_of_the_vmm_are_userspace() -> None:
    script = Script()(0, "kvm_entry")(100, "kvm_exit", exit_reason=IO, isa=1)(40, "kvm_userspace_exit", reason=2)
    script(3, "sys_exit_ioctl")(50, "sys_enter_ioctl", cmd=0x8090AE81)(10, "sys_exit_ioctl")
    script(40, "sys_enter_ioctl", cmd=KVM_RUN)(9, "kvm_entry")
    assert only_vcpu(script.rows).budget.userspace_ns == 100


@pytest.mark.parametrize("begin", ["kvm_fpu", "kvm_entry"])
def test_without_ioctl_events_the_next_sign_of_kvm_run_ends_userspace(begin: str) -> None:
    script = Script()(0, "kvm_entry")(100, "kvm_exit", exit_reason=IO, isa=1)(40, "kvm_userspace_exit", reason=6)
    if begin == "kvm_fpu":
        script(600, "kvm_fpu", load=1)(9, "kvm_entry")
    else:
        script(600, "kvm_entry")
    assert only_vcpu(script.rows).budget.userspace_ns == 600


def halt(*, waited: bool, scheduled: bool) -> list[Row]:
    """Return a HLT of 1000 ns: 200 of polling, then (waited) 700 asleep, 100 awake."""
    script = Script()(0, "kvm_entry")(100, "kvm_exit", exit_reason=HLT, isa=1)
    if waited and scheduled:
        script(250, "sched_switch", prev_pid=100, prev_state=1, next_pid=0)
        script.rows.append((script.now + 700, 0, 0, "sched_switch", {"prev_pid": 0, "next_pid": 100}))
        script(750, "kvm_vcpu_wakeup", ns=950, waited=True)
    else:
        script(1000, "kvm_vcpu_wakeup", ns=950, waited=waited)
    return script(20, "kvm_entry").rows


def test_halt_poll_then_sleep() -> None:
    budget = only_vcpu(halt(waited=True, scheduled=True)).budget
    assert (budget.halt_poll_ns, budget.blocked_ns, budget.handler_ns) == (200, 700, 50 + 50 + 20)


def test_poll_that_was_enough() -> None:
    budget = only_vcpu(halt(waited=False, scheduled=False)).budget
    assert (budget.halt_poll_ns, budget.blocked_ns, budget.handler_ns) == (950, 0, 70)


def test_sleep_where_scheduling_was_not_recorded() -> None:
    budget = only_vcpu(halt(waited=True, scheduled=False)).budget
    assert (budget.halt_poll_ns, budget.blocked_ns, budget.handler_ns) == (0, 950, 70)


def test_a_halt_that_nothing_explains_is_unknown() -> None:
    script = Script()(0, "kvm_entry")(100, "kvm_exit", exit_reason=HLT, isa=1)(900, "kvm_entry")
    script(100, "kvm_exit", exit_reason=CPUID, isa=1)(10, "kvm_entry")
    budget = only_vcpu(script.rows).budget
    assert (budget.unknown_ns, budget.handler_ns, budget.blocked_ns) == (900, 10, None)


def test_time_that_steps_back_keeps_the_sum() -> None:
    rows = [
        (1000, 0, 5, "kvm_entry"),
        (1100, 0, 5, "kvm_exit", {"exit_reason": 10, "isa": 1}),
        (1050, 0, 5, "kvm_entry"),
        (1500, 0, 5, "kvm_exit", {"exit_reason": 10, "isa": 1}),
    ]
    found = report(rows)
    assert found.vcpus[0].wall_ns == 500 == found.vcpus[0].budget.total_ns()
    assert found.loss.discarded_intervals == 1
    assert (found.exits[0].count, found.exits[0].samples, found.exits[0].total_ns) == (2, 0, None)


def test_what_a_thread_did_before_its_first_kvm_event_does_not_count() -> None:
    rows = [
        (0, 0, 5, "sched_switch", {"prev_pid": 5, "prev_state": 1, "next_pid": 9}),
        (400, 0, 9, "sched_switch", {"prev_pid": 9, "prev_state": 0, "next_pid": 5}),
        (500, 0, 5, "kvm_entry"),
        (600, 0, 5, "kvm_exit", {"exit_reason": 10, "isa": 1}),
    ]
    (vcpu,) = report(rows).vcpus
    assert (vcpu.tid, vcpu.wall_ns, vcpu.budget.guest_ns, vcpu.budget.blocked_ns) == (5, 100, 100, 0)


def test_migrations_and_cpus() -> None:
    rows = [
        (0, 0, 5, "kvm_entry"),
        (10, 0, 5, "kvm_exit", {"exit_reason": 10, "isa": 1}),
        (20, 3, 5, "kvm_entry"),
        (30, 3, 5, "kvm_exit", {"exit_reason": 10, "isa": 1}),
        (40, 0, 5, "kvm_entry"),
    ]
    (vcpu,) = report(rows).vcpus
    assert (vcpu.migrations, vcpu.cpus) == (2, (0, 3))


def random_life(seed: int, n: int = 300) -> list[Row]:
    """Return events of two vCPU threads and a bystander, in any order."""
    rng = random.Random(seed)
    now, rows = 1000, []
    kinds = [kind for kind in FIELDS if kind != "lost_events"]
    for _ in range(n):
        now += rng.choice([0, 3, 50, 2000])
        tid = rng.choice([11, 12, 12, 99])
        kind = rng.choice(["kvm_entry", "kvm_exit", *kinds]) if tid != 99 else "sched_switch"
        fields: dict[str, object] = {
            "kvm_exit": {"exit_reason": rng.choice([HLT, CPUID, IO]), "isa": 1, "guest_rip": rng.randrange(4)},
            "kvm_userspace_exit": {"reason": rng.choice([2, 6]), "errno": rng.choice([0, -4])},
            "kvm_fpu": {"load": rng.randrange(2)},
            "sys_enter_ioctl": {"cmd": rng.choice([KVM_RUN, 1])},
            "kvm_vcpu_wakeup": {"ns": rng.randrange(3000), "waited": rng.randrange(2)},
            "kvm_mmio": {"type": rng.randrange(3), "gpa": rng.randrange(3) << 12},
            "kvm_pio": {"port": rng.randrange(3), "rw": rng.randrange(2)},
            "kvm_msr": {"exception": rng.randrange(2)},
            "sched_switch": {
                "prev_pid": tid,
                "prev_state": rng.choice([0, 1, 0x100]),
                "next_pid": rng.choice([11, 12, 0]),
            },
        }.get(kind, {})
        rows.append((now, rng.randrange(2), tid, kind, fields))
    return rows


@pytest.mark.parametrize("seed", range(30))
def test_the_document_does_not_depend_on_how_the_recording_is_cut(seed: int) -> None:
    rows = random_life(seed)
    rng = random.Random(seed)
    table = make_table(rows, list(FIELDS))
    whole = build_report(TableRecording(table), ReportOptions(model=False))
    for n_cuts in (1, 3, 40):
        cuts = sorted(rng.sample(range(len(rows)), n_cuts))
        pieces = build_report(TableRecording(table, cuts), ReportOptions(model=False))
        assert to_json(pieces) == to_json(whole)
    for vcpu in whole.vcpus:
        assert vcpu.budget.total_ns() == vcpu.wall_ns
    for row in whole.exits:
        if row.samples:
            assert sum(getattr(row, name) or 0 for name in EXIT_PARTS) == row.total_ns
