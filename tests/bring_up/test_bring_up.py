"""Constructions, right and wrong, and what the model says of each call."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvmtrace.bring_up.follow import follow_bring_up
from kvmtrace.kvm import ioctls
from kvmtrace.table.event_table import COMMON_DTYPES, EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload

if TYPE_CHECKING:
    from kvmtrace.bring_up.followed import BringUp

U64, I64 = np.dtype(np.uint64), np.dtype(np.int64)
KINDS = (
    EventKind("sys_enter_ioctl", "syscalls", {"fd": U64, "cmd": U64, "arg": U64}),
    EventKind("sys_exit_ioctl", "syscalls", {"ret": I64}),
    EventKind("sys_enter_openat", "syscalls", {"dfd": U64}),
    EventKind("sys_exit_openat", "syscalls", {"ret": I64}),
    EventKind("sys_enter_mmap", "syscalls", {"fd": U64, "len": U64}),
    EventKind("sys_exit_mmap", "syscalls", {"ret": I64}),
    EventKind("sys_enter_close", "syscalls", {"fd": U64}),
    EventKind("sched_process_fork", "sched", {"parent_pid": I64, "child_pid": I64}),
)
INDEX = {kind.name: i for i, kind in enumerate(KINDS)}


def table(*calls: tuple) -> EventTable:
    """Build events from (tid, name, fields of the entry, return value) in order; ret None: no return recorded."""
    rows: list[tuple[int, str, dict[str, int]]] = []
    for tid, name, fields, ret in calls:
        rows.append((tid, name if name in INDEX else f"sys_enter_{name}", fields))
        if ret is not None and f"sys_exit_{name}" in INDEX:
            rows.append((tid, f"sys_exit_{name}", {"ret": ret}))
    columns = {name: np.zeros(len(rows), dtype) for name, dtype in COMMON_DTYPES.items()}
    columns["ts_ns"] = np.arange(len(rows)) * 100
    columns["tid"] = np.array([tid for tid, _, _ in rows], np.int32)
    columns["kind"] = np.array([INDEX[name] for _, name, _ in rows], np.uint16)
    payloads = {}
    for i, kind in enumerate(KINDS):
        own = [fields for _, name, fields in rows if name == kind.name]
        if own:
            payloads[i] = ColumnPayload(
                {f: np.array([row[f] for row in own], dtype) for f, dtype in kind.fields.items()}
            )
    return EventTable(columns, KINDS, payloads)


def ioctl(fd: int, cmd: int, ret: int | None, arg: int = 0, tid: int = 7) -> tuple:
    return (tid, "ioctl", {"fd": fd, "cmd": cmd, "arg": arg}, ret)


OPEN = (7, "openat", {"dfd": 0}, 3)
START = (OPEN, ioctl(3, ioctls.KVM_GET_API_VERSION, 12), ioctl(3, ioctls.KVM_CREATE_VM, 4))


def follow(*calls: tuple, **options: object) -> BringUp:
    result = follow_bring_up(table(*calls), **options)
    assert result is not None
    return result


def test_textbook_order_conforms_and_types_every_descriptor() -> None:
    result = follow(
        *START,
        ioctl(4, ioctls.KVM_CREATE_IRQCHIP, 0),
        ioctl(4, ioctls.KVM_SET_USER_MEMORY_REGION, 0, arg=99),
        ioctl(4, ioctls.KVM_CREATE_VCPU, 5),
        (7, "mmap", {"fd": 5, "len": 12288}, 0x7F00),
        ioctl(5, ioctls.KVM_SET_CPUID2, 0, arg=77),
        ioctl(5, ioctls.KVM_RUN, 0, tid=8),
        isa="vmx",
    )
    assert [known.id for known in result.objects] == ["kvm0", "vm0", "vm0.irqchip", "vm0.memslots", "vm0.vcpu0"]
    assert {step.verdict for step in result.steps} == {"ok"}
    vcpu = result.objects[-1]
    assert (vcpu.fd, vcpu.number, vcpu.run_tids, vcpu.mmap_bytes) == (5, 0, (8,), 12288)
    assert "vcpu_vmx" in vcpu.kernel_object
    assert "VMCS" in vcpu.kernel_object
    assert [step.name for step in result.steps][:3] == ["/dev/kvm", "KVM_GET_API_VERSION", "KVM_CREATE_VM"]
    assert not result.notes


def test_qemu_order_with_vcpus_before_memory_is_legal() -> None:
    result = follow(*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5), ioctl(4, ioctls.KVM_SET_USER_MEMORY_REGION, 0, arg=1))
    assert result.conforms
    assert result.n_explained == 0


@pytest.mark.parametrize(
    ("before", "cmd", "number"),
    [
        (ioctl(4, ioctls.KVM_CREATE_VCPU, 5), ioctls.KVM_CREATE_IRQCHIP, errno.EINVAL),
        (ioctl(4, ioctls.KVM_CREATE_IRQCHIP, 0), ioctls.KVM_CREATE_IRQCHIP, errno.EEXIST),
        (ioctl(4, ioctls.KVM_CREATE_PIT2, 0, arg=1), ioctls.KVM_CREATE_PIT2, errno.EEXIST),
        (ioctl(4, ioctls.KVM_CREATE_VCPU, 5), ioctls.KVM_CREATE_VCPU, errno.EEXIST),
        (ioctl(4, ioctls.KVM_CREATE_VCPU, 5), ioctls.KVM_SET_IDENTITY_MAP_ADDR, errno.EINVAL),
    ],
)
def test_a_wrong_order_is_explained_if_refused_and_a_violation_if_accepted(
    before: tuple, cmd: int, number: int
) -> None:
    refused = follow(*START, before, ioctl(4, cmd, -number))
    assert refused.steps[-1].verdict == "explained"
    assert errno.errorcode[number] in refused.steps[-1].sentence
    assert refused.conforms
    accepted = follow(*START, before, ioctl(4, cmd, 9 if cmd == ioctls.KVM_CREATE_VCPU else 0))
    assert accepted.steps[-1].verdict == "violation"
    assert not accepted.conforms
    other_errno = follow(*START, before, ioctl(4, cmd, -errno.ENOMEM))
    assert other_errno.steps[-1].verdict == "unknown"


def test_kvm_run_from_another_process() -> None:
    calls = (*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5))
    refused = follow(*calls, ioctl(5, ioctls.KVM_RUN, -errno.EIO, tid=9), processes={7: 7, 9: 9})
    assert refused.steps[-1].verdict == "explained"
    assert "process" in refused.steps[-1].sentence
    fork = (7, "sched_process_fork", {"parent_pid": 7, "child_pid": 9}, None)
    accepted = follow(*calls, fork, ioctl(5, ioctls.KVM_RUN, 0, tid=9), processes={7: 7, 9: 9})
    assert accepted.steps[-1].verdict == "violation"
    thread = follow(*calls, ioctl(5, ioctls.KVM_RUN, 0, tid=9), processes={7: 7, 9: 7})
    assert thread.conforms


def test_use_after_close_names_what_was_closed() -> None:
    result = follow(*START, (7, "close", {"fd": 4}, 0), ioctl(4, ioctls.KVM_CREATE_VCPU, -errno.EBADF))
    assert result.steps[-1].verdict == "explained"
    assert "vm0 was closed" in result.steps[-1].sentence
    assert next(known for known in result.objects if known.id == "vm0").closed_ts_ns is not None


def test_two_vms_in_one_process_keep_their_vcpus_apart() -> None:
    result = follow(
        *START,
        ioctl(3, ioctls.KVM_CREATE_VM, 6),
        ioctl(6, ioctls.KVM_CREATE_VCPU, 8),
        ioctl(4, ioctls.KVM_CREATE_VCPU, 9),
    )
    assert {(known.id, known.fd) for known in result.objects if known.kind == "vcpu"} == {
        ("vm1.vcpu0", 8),
        ("vm0.vcpu0", 9),
    }
    assert result.conforms


def test_a_recording_begun_in_mid_run_assumes_and_says_so() -> None:
    result = follow(ioctl(11, ioctls.KVM_RUN, 0))
    assert [(known.kind, known.assumed) for known in result.objects] == [("system", True), ("vm", True), ("vcpu", True)]
    assert result.conforms
    assert any("before the recording" in note for note in result.notes)


def test_an_ioctl_on_the_wrong_file_is_explained() -> None:
    result = follow(*START, ioctl(3, ioctls.KVM_CREATE_VCPU, -errno.ENOTTY))
    assert result.steps[-1].verdict == "explained"
    assert follow(*START, ioctl(3, ioctls.KVM_CREATE_VCPU, 5)).steps[-1].verdict == "violation"


def test_wrong_api_version_is_a_violation() -> None:
    assert not follow(OPEN, ioctl(3, ioctls.KVM_GET_API_VERSION, 13)).conforms


def test_a_descriptor_number_used_again_is_a_new_object() -> None:
    result = follow(
        *START, (7, "close", {"fd": 4}, 0), ioctl(3, ioctls.KVM_CREATE_VM, 4), ioctl(4, ioctls.KVM_CREATE_IRQCHIP, 0)
    )
    assert result.steps[-1].object == "vm1"
    assert result.conforms


def test_only_the_first_run_of_each_thread_is_a_step_but_failures_are() -> None:
    runs = [ioctl(5, ioctls.KVM_RUN, 0) for _ in range(50)]
    result = follow(*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5), *runs, ioctl(5, ioctls.KVM_RUN, -errno.EFAULT))
    assert [step.ret for step in result.steps if step.name == "KVM_RUN"] == [0, -errno.EFAULT]
    assert result.ioctl_counts["KVM_RUN"] == 51


def test_the_first_run_on_a_descriptor_number_used_again_is_a_step() -> None:
    again = [
        ioctl(3, ioctls.KVM_CREATE_VM, 4),
        ioctl(4, ioctls.KVM_CREATE_VCPU, 5),
        ioctl(5, ioctls.KVM_RUN, 0),
        ioctl(5, ioctls.KVM_RUN, 0),
        (7, "close", {"fd": 5}, 0),
        (7, "close", {"fd": 4}, 0),
    ]
    result = follow(*START[:2], *again, *again)
    assert [step.object for step in result.steps if step.name == "KVM_RUN"] == ["vm0.vcpu0", "vm1.vcpu0"]
    assert {known.id: known.run_tids for known in result.objects if known.kind == "vcpu"} == {
        "vm0.vcpu0": (7,),
        "vm1.vcpu0": (7,),
    }
    assert result.conforms


def test_what_another_process_closes_makes_no_run_the_first() -> None:
    run, close = ioctl(5, ioctls.KVM_RUN, 0, tid=8), (90, "close", {"fd": 5}, 0)
    calls = (*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5), run, close, run, close, run)
    result = follow(*calls, processes={7: 7, 8: 7, 90: 90})
    assert [step.name for step in result.steps].count("KVM_RUN") == 1
    closes = [(7, "close", {"fd": 5}, 0) if call is close else call for call in calls]
    assert [step.name for step in follow(*closes, processes={7: 7, 8: 7}).steps].count("KVM_RUN") == 3


def test_without_ioctl_events_there_is_no_bring_up() -> None:
    columns = {name: np.zeros(0, dtype) for name, dtype in COMMON_DTYPES.items()}
    assert follow_bring_up(EventTable(columns, (EventKind("kvm_exit", "kvm"),), {})) is None


def test_threads_belong_to_the_process_whose_leader_was_not_learnt() -> None:
    calls = (*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5, tid=8), ioctl(5, ioctls.KVM_RUN, 0, tid=8))
    result = follow(*calls, processes={8: 7, 30: 30})  # 7 is not in it, as QEMU's main thread was not
    assert result.conforms
    assert [known.assumed for known in result.objects] == [False, False, False]


def test_a_thread_of_unknown_process_is_no_violation_and_its_eio_is_explained() -> None:
    calls = (*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5))
    assert follow(*calls, ioctl(5, ioctls.KVM_RUN, 0, tid=9), processes={7: 7}).conforms
    refused = follow(*calls, ioctl(5, ioctls.KVM_RUN, -errno.EIO, tid=9), processes={7: 7}).steps[-1]
    assert refused.verdict == "explained"
    assert "was not recorded" in refused.sentence
    own = follow(*calls, ioctl(5, ioctls.KVM_RUN, -errno.EIO), processes={7: 7}).steps[-1]
    assert own.verdict == "unknown"


def test_an_unknown_vendor_is_not_named() -> None:
    vcpu = follow(*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5)).objects[-1]
    assert vcpu.kernel_object.startswith("struct kvm_vcpu of this host's vendor module")


@pytest.mark.parametrize(
    ("cmd", "fd", "number"),
    [
        (ioctls.KVM_GET_SUPPORTED_CPUID, 3, errno.E2BIG),
        (ioctls.KVM_GET_MSR_INDEX_LIST, 3, errno.E2BIG),
        (ioctls.KVM_KVMCLOCK_CTRL, 5, errno.EINVAL),
    ],
)
def test_failures_of_a_healthy_start_are_explained_and_others_are_not(cmd: int, fd: int, number: int) -> None:
    calls = (*START, ioctl(4, ioctls.KVM_CREATE_VCPU, 5))
    assert follow(*calls, ioctl(fd, cmd, -number, arg=1)).steps[-1].verdict == "explained"
    assert follow(*calls, ioctl(fd, cmd, -errno.ENOMEM, arg=1)).steps[-1].verdict == "unknown"
    assert follow(*calls, ioctl(fd, cmd, 0, arg=1)).steps[-1].verdict == "ok"


def test_two_processes_may_use_the_same_descriptor_numbers() -> None:
    own = (
        ioctl(10, ioctls.KVM_RUN, 0, tid=21),
        ioctl(10, ioctls.KVM_RUN, 0, tid=31),
        ioctl(8, ioctls.KVM_SET_USER_MEMORY_REGION, 0, arg=1, tid=20),
        ioctl(8, ioctls.KVM_SET_USER_MEMORY_REGION, 0, arg=1, tid=30),
    )
    result = follow(*own, processes={20: 20, 21: 20, 30: 30, 31: 30})
    assert result.conforms
    assert {(item.id, item.run_tids) for item in result.objects if item.kind == "vcpu"} == {
        ("vm0.vcpu0", (21,)),
        ("vm1.vcpu0", (31,)),
    }
    # the VM assumed for a vCPU is the one whose descriptor turns up later
    assert [(item.id, item.fd) for item in result.objects if item.kind == "vm"] == [("vm0", 8), ("vm1", 8)]


def test_a_grandchild_has_the_files_of_its_ancestors() -> None:
    forks = [(7, "sched_process_fork", {"parent_pid": p, "child_pid": c}, None) for p, c in ((7, 8), (8, 9))]
    result = follow(*START, *forks, ioctl(3, ioctls.KVM_GET_API_VERSION, 12, tid=9), processes={7: 7, 8: 8, 9: 9})
    assert result.steps[-1].object == "kvm0"
    assert sum(item.kind == "system" for item in result.objects) == 1


def test_an_answer_that_is_no_errno_is_told() -> None:
    from kvmtrace.bring_up.calls import Call
    from kvmtrace.bring_up.contract_check import _judge_failure

    call = Call("ioctl", 0, 0, 1, 212, 10, 44672, 0, -(2**63))
    assert _judge_failure(call, "", of_unknown_process=False).verdict == "unknown"
