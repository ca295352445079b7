"""Reports that can be shared: no host names, thread names, file paths or guest addresses.

Consistently: the same address or name gets the same stand-in everywhere in one report, so that repetitions
stay visible. Durations, counts, reasons, ports and MSRs are kept: they are what a report is for.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.bring_up.followed import BringUp
    from kvmtrace.check.explain import Story
    from kvmtrace.check.verdict import Comparison, Violation
    from kvmtrace.report.document import Report
    from kvmtrace.report.over_time import Timeline
    from kvmtrace.stats.rows import SlowExit, StolenRow, VmRow

T = TypeVar("T")

PAGE_MASK = 0xFFF
FIRST_HIDDEN = 0x10000  # below lie the vectors and stubs of every real-mode guest
FIRST_PAGE = 0x10_0000  # of the stand-ins: from 4 GiB on
ADDRESS_FIELDS = frozenset(
    {
        "rip",
        "guest_rip",
        "gpa",
        "gva",
        "address",
        "fault_address",
        "val",
        "data",
        "vcpu",
        "arg",
        "a0",
        "a1",
        "a2",
        "a3",
        "info2",
        "filp",
        "hva",
        "gfn",
        "ingpa",
        "outgpa",
        "rax",
        "rbx",
        "rcx",
        "rdx",
    }
)
COMM_FIELDS = frozenset({"comm", "prev_comm", "next_comm", "child_comm", "parent_comm", "newcomm", "oldcomm"})
_LONG_HEX = re.compile(r"0x[0-9a-fA-F]{5,16}\b")
HEXDUMP = re.compile(r"\b[0-9a-f]{2}( [0-9a-f]{2})+( \.\.\.)?")
# of a capture's metadata: what says nothing of the host, its users and its guests
KEPT_META = frozenset(
    {
        "schema",
        "kvmtrace",
        "kernel",
        "backend",
        "clock",
        "event_set",
        "events",
        "missing_events",
        "loss",
        "duration_ns",
        "n_events",
        "filters",
        "ended_by",
        "discarded",
        "buffer_bytes",
        "cost_ns_per_event",
        "recorder_cpu_ns",
    }
)


class StandIns:
    """Hands out stand-ins, the same one for the same value."""

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}
        self._names: dict[str, str] = {}
        self._vms: dict[str, str] = {}

    def address(self, value: int) -> int:
        """Return an address on a stand-in page; the offset within the page is kept, and so is the first 64 KiB."""
        if value < FIRST_HIDDEN:
            return value
        page = self._pages.setdefault(value >> 12, FIRST_PAGE + len(self._pages))
        return page << 12 | value & PAGE_MASK

    def told_address(self, value: int | None) -> int | None:
        """Return the same of an address that may not have been told."""
        return None if value is None else self.address(value)

    def name(self, value: str) -> str:
        """Return thread-1, thread-2 ..."""
        return self._names.setdefault(value, f"thread-{len(self._names) + 1}")

    def vm(self, value: str) -> str:
        """Return vm-1, vm-2 ..."""
        return self._vms.setdefault(value, f"vm-{len(self._vms) + 1}")

    def text(self, value: str) -> str:
        """Return text with its hexadecimal addresses (5 digits and more) replaced."""
        return _LONG_HEX.sub(lambda match: f"{self.address(int(match[0], 16)):#x}", value)


def anonymized(report: Report) -> Report:
    """Return a report without host, cpu model, paths, names and addresses."""
    names = StandIns()
    capture = replace(report.capture, path="recording", host=None, cpu_model=None, kernel=report.capture.kernel)
    vms = tuple(_vm(row, names) for row in report.vms)
    if capture.vm:
        capture = replace(capture, vm=", ".join(names.vm(name) for name in capture.vm.split(", ")))
    vcpus = tuple(
        replace(row, comm=names.name(row.comm) if row.comm else None, vm=names.vm(row.vm) if row.vm else None)
        for row in report.vcpus
    )
    detail = replace(
        report.detail,
        gpas=tuple(replace(row, gpa=names.address(row.gpa)) for row in report.detail.gpas),
        rips=tuple(
            replace(row, rip=None if row.rip is None else names.address(row.rip), symbol=None)
            for row in report.detail.rips
        ),
    )
    damage = tuple(
        replace(place, found=names.text(HEXDUMP.sub("(left out)", place.found))) for place in report.loss.damage
    )
    return replace(
        report,
        capture=capture,
        loss=replace(report.loss, damage=damage, notes=()),
        vcpus=vcpus,
        vms=vms,
        stolen=tuple(_stolen(row, names) for row in report.stolen),
        wake_ups=tuple(replace(row, vm=names.vm(row.vm) if row.vm else None) for row in report.wake_ups),
        triggers=tuple(
            replace(row, vm=names.vm(row.vm) if row.vm else None, trigger=row.kind, detail=None)
            for row in report.triggers
        ),
        detail=detail,
        slowest=tuple(_slow(row, names) for row in report.slowest),
        model=_model(report.model, names),
        bring_up=_bring_up(report.bring_up, names),
        replay=_cleaned("", report.replay, names),
        timeline=_timeline(report.timeline, names),
    )


def _slow(row: SlowExit, names: StandIns) -> SlowExit:
    key = row.access_key
    if key is not None and row.access in {"mmio", "page"}:
        key = names.address(key)
    vm = names.vm(row.vm) if row.vm else None
    return replace(row, guest_rip=names.told_address(row.guest_rip), access_key=key, vm=vm)


def _stolen(row: StolenRow, names: StandIns) -> StolenRow:
    """Return a wait without the names of VMs, processes and threads."""
    who = {
        "vcpu": names.vm,
        "own vcpu": names.vm,
        "vmm": names.name,
        "vhost": names.name,
        "process": names.name,
        "kernel": names.name,
    }
    told = who[row.kind](row.who) if row.kind in who else row.who
    return replace(row, vm=names.vm(row.vm) if row.vm else None, who=told)


def _vm(row: VmRow, names: StandIns) -> VmRow:
    """Return a VM without anything that tells which it is."""
    return replace(
        row,
        name=names.vm(row.name) if row.name else None,
        comm=names.name(row.comm) if row.comm else None,
        uuid=None,
        unit=None,
        pod=None,
        namespace=None,
        container=None,
    )


def _bring_up(bring_up: BringUp | None, names: StandIns) -> BringUp | None:
    """Return the construction cleaned; why QEMU did not answer names its socket."""
    if bring_up is None:
        return None
    if bring_up.qmp is not None and bring_up.qmp.error:
        bring_up = replace(bring_up, qmp=replace(bring_up.qmp, error="QEMU did not answer"))
    return _cleaned("", bring_up, names)


def anonymized_story(story: Story) -> Story:
    """Return the story of a VM-exit without names and addresses."""
    names = StandIns()
    events = tuple(
        replace(event, fields={name: _field(name, value, names) for name, value in event.fields.items()})
        for event in story.events
    )
    ran = tuple((names.name(who), ns) for who, ns in story.ran)
    return replace(story, events=events, ran=ran, vm=names.vm(story.vm) if story.vm else None)


def anonymized_summary(data: bytes, meta: Mapping[str, Any]) -> bytes:
    """Return a sound summary file (JSON) without names; `meta` is its metadata, checked."""
    names, value = StandIns(), json.loads(data)
    value["meta"] = anonymized_meta(meta, names)
    for row in value["vcpus"]:
        row["comm"] = names.name(row["comm"])
    return json.dumps(value, separators=(",", ":")).encode()


def anonymized_meta(meta: Mapping[str, Any], names: StandIns) -> dict[str, Any]:
    """Return a capture's checked metadata without what tells of the host, its users and its guests."""
    kept = {name: value for name, value in meta.items() if name in KEPT_META}
    vms = [
        {
            "pid": vm["pid"],
            "kind": vm.get("kind"),
            "comm": names.name(vm["comm"]) if vm.get("comm") else None,
            "name": names.vm(vm["name"]) if vm.get("name") else None,
            "vcpus": vm.get("vcpus"),
        }
        for vm in meta.get("vms") or ()
    ]
    return kept | ({"vms": vms} if vms else {})


def _timeline(timeline: Timeline | None, names: StandIns) -> Timeline | None:
    """Return the timeline with numbered lanes and stand-in addresses."""
    if timeline is None:
        return None
    lanes = tuple(replace(lane, label=f"vCPU lane {i + 1}") for i, lane in enumerate(timeline.lanes))
    chosen = tuple(replace(one, guest_rip=names.told_address(one.guest_rip)) for one in timeline.chosen)
    windows = tuple(replace(one, rips=tuple(names.address(rip) for rip in one.rips)) for one in timeline.windows)
    hidden = {"mmio", "page"}
    follow_ups = tuple(
        replace(one, number=names.address(one.number)) if one.what in hidden and one.number is not None else one
        for one in timeline.follow_ups
    )
    named = tuple(
        replace(one, number=names.address(one.number)) if one.what == "rip" else one for one in timeline.places.named
    )
    places = replace(timeline.places, named=named)
    return replace(timeline, lanes=lanes, chosen=chosen, windows=windows, follow_ups=follow_ups, places=places)


def _model(model: Comparison | None, names: StandIns) -> Comparison | None:
    """Return the comparison with its violations cleaned."""
    if model is None:
        return None
    violations = {id(v): _violation(v, names) for v in model.violations}
    first = model.first_divergence
    return replace(
        model,
        violations=tuple(violations[id(v)] for v in model.violations),
        first_divergence=violations.get(id(first)) or (_violation(first, names) if first else None),
    )


def _violation(violation: Violation, names: StandIns) -> Violation:
    context = tuple(
        replace(event, fields={name: _field(name, value, names) for name, value in event.fields.items()})
        for event in violation.context
    )
    return replace(
        violation,
        expected=names.text(violation.expected),
        observed=names.text(violation.observed),
        why=names.text(violation.why),
        context=context,
        vm=names.vm(violation.vm) if violation.vm else None,
    )


def _field(name: str, value: Any, names: StandIns) -> Any:
    if name in COMM_FIELDS and isinstance(value, str):
        return names.name(value)
    if isinstance(value, int) and not isinstance(value, bool):
        is_address = name in ADDRESS_FIELDS or (value >= 1 << 32 and not name.endswith("_ns"))
        return names.address(value) if is_address else value
    return names.text(value) if isinstance(value, str) else value


def _cleaned(name: str, value: T, names: StandIns) -> T:
    """Return a part of the document, cleaned throughout."""
    cleaned: T = _clean(name, value, names)
    return cleaned


def _clean(name: str, value: Any, names: StandIns) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _clean(f.name, getattr(value, f.name), names) for f in fields(value)})
    if isinstance(value, dict):
        return {key: _clean(str(key), item, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clean(name, item, names) for item in value)
    return _field(name, value, names)
