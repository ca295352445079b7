"""Levels of VM-exits, and VM-exits of L2 as L2 sees them, however the recording is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvmtrace.check.examples import text_trace
from kvmtrace.formats import open_recording
from kvmtrace.kvm.nested_events import LEVEL_EVENTS
from kvmtrace.spans.lane_builder import _SIMPLE_STEPS
from kvmtrace.spans.lanes import NESTED_STEPS
from kvmtrace.spans.nested_chains import CHAIN_DTYPE, NestedChains, collect_chains
from kvmtrace.spans.row_columns import nested_columns
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.spans.vm_exits import collect_vm_exits

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kvmtrace.table.recording import Recording

EXIT = "guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0"
# L1 enters L2, which exits twice: KVM handles the first, L1 the second with a VMWRITE; then L2's time ends in HLT
STORY = f"""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=24 {EXIT}
kvm_nested_vmenter: rip=0x1000 vmcb=0x3000 nested_rip=0x1000 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 {EXIT}
kvm_nested_vmexit: exit_reason=1 {EXIT}
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 {EXIT}
kvm_nested_vmexit: exit_reason=10 {EXIT}
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
kvm_exit: exit_reason=25 {EXIT}
kvm_entry: vcpu_id=0 rip=0x2003
kvm_exit: exit_reason=24 {EXIT}
kvm_nested_vmenter: rip=0x1000 vmcb=0x3000 nested_rip=0x1002 int_ctl=0 event_inj=0 tdp_enabled=1 guest_pgd=0 isa=1
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=12 {EXIT}
kvm_nested_vmexit: exit_reason=12 {EXIT}
kvm_fpu: load=0
"""
LEVELS = [1, 2, 2, 1, 1, 2]


def recorded(story: str, tmp_path: Path) -> Recording:
    path = tmp_path / "trace.txt"
    path.write_text(text_trace(story))
    return open_recording(path)


def without(event: str) -> str:
    return "\n".join(line for line in STORY.splitlines() if not line.startswith(f"{event}:"))


def chains(recording: Recording, n_events: int) -> NDArray[Any]:
    followed, found = NestedChains(), [np.empty(0, CHAIN_DTYPE)]
    found += [
        followed.feed(spans).ended for spans in iter_spans(recording.iter_events(n_events), SpanBuilder(rows=True))
    ]
    return np.concatenate([*found, followed.finish()])


@pytest.mark.parametrize("n_events", [1000, 7, 3])
def test_levels(tmp_path: Path, n_events: int) -> None:
    rows = collect_vm_exits(recorded(STORY, tmp_path).iter_events(n_events))
    assert rows["level"].tolist() == LEVELS


def test_without_the_event_of_every_exit_the_switches_tell(tmp_path: Path) -> None:
    rows = collect_vm_exits(recorded(without("kvm_nested_vmexit"), tmp_path).iter_events())
    assert rows["level"].tolist() == LEVELS


def test_without_any_event_nothing_is_known(tmp_path: Path) -> None:
    story = "\n".join(line for line in STORY.splitlines() if not line.startswith("kvm_nested"))
    rows = collect_vm_exits(recorded(story, tmp_path).iter_events())
    assert rows["level"].tolist() == [0] * len(LEVELS)


@pytest.mark.parametrize("n_events", [1000, 7, 3])
def test_chains(tmp_path: Path, n_events: int) -> None:
    rows = chains(recorded(STORY, tmp_path), n_events)
    told = [tuple(row) for row in rows[["number", "reflected", "complete", "l1_exits"]]]
    assert told == [(2, False, True, 0), (3, True, True, 2), (6, False, False, 0)]
    # a microsecond between two events
    assert rows["dur_ns"].tolist()[:2] == [2000, 8000]
    assert rows["l0_ns"].tolist()[:2] == [2000, 6000]
    assert rows["l1_guest_ns"].tolist()[:2] == [0, 2000]


def test_every_event_that_tells_a_level_is_a_step() -> None:
    assert {event for event, step in _SIMPLE_STEPS.items() if step in NESTED_STEPS} == {
        row.event for row in LEVEL_EVENTS
    }


def test_chains_as_columns(tmp_path: Path) -> None:
    columns = nested_columns(*collect_chains(recorded(STORY, tmp_path).iter_events()))
    assert columns["number"].values.tolist() == [2, 3, 6]
    name = columns["name"]
    assert name.texts is not None
    assert [name.texts[i] for i in name.values.tolist()] == ["EXTERNAL_INTERRUPT", "CPUID", "HLT"]
    assert columns["exit_reason"].values.tolist() == [1, 10, 12]
