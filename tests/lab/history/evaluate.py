"""What the checker says of each recording, held against what is known of the bug."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from history.catalogue import put_back
from history.steps import step_of, twin_of
from kvmtrace.check.engine import check_recording
from kvmtrace.errors import KvmtraceError
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from history.catalogue import Bug, Moment
    from kvmtrace.check.verdict import Comparison, Violation
    from kvmtrace.table.event_table import EventTable

_CAUGHT = re.compile(r"(WARNING|BUG|Oops|general protection|scheduling while atomic|suspicious RCU)", re.IGNORECASE)


@dataclass(frozen=True)
class Result:
    """One bug in one ISA's lab.

    Parameters
    ----------
    found : "violation", "suspicion", "invisible" or "not recorded"
    rules : rule -> how often, those that the healthy twin keeps
    first : the first finding, "expected ... observed ...", "" if none
    source : the functions that it names
    distance : VM-exits from the fault to the finding, None if one of the two is not known
    named : "function", "file" or "no": what of the faulty code the finding names; "" if nothing was found
    false_alarms : findings on the healthy twin
    kernel_log : the kernel's own word on it ("WARNING: ..."), "" if it said nothing
    probe : whether the bug's probes show it: "shown" or "not shown"; "" if it has none
    events, healthy_events : recorded
    """

    bug: str
    isa: str
    found: str
    rules: dict[str, int]
    first: str = ""
    source: str = ""
    distance: int | None = None
    named: str = ""
    false_alarms: int = 0
    kernel_log: str = ""
    probe: str = ""
    events: int = 0
    healthy_events: int = 0


def evaluate(isas: Iterable[str], folder: Path, names: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Check the recordings in `folder`/ISA, those of the named bugs or all."""
    wanted = set(names)
    return [
        asdict(judge(bug, isa, folder / isa))
        for isa in isas
        for bug in put_back(isa)
        if not wanted or bug.name in wanted
    ]


def judge(bug: Bug, isa: str, folder: Path) -> Result:
    """Compare the recording of a bug, and of its twin, with the model."""
    faulty, healthy = (folder / f"{step.name}.dat" for step in (step_of(bug), twin_of(bug)))
    log = folder / f"{bug.name}.dmesg"
    said = _kernels_word(log.read_text(errors="replace")) if log.exists() else ""
    verdict, twin = _verdict(faulty), _verdict(healthy)
    if verdict is None or twin is None:
        return Result(bug.name, isa, "not recorded", {}, kernel_log=said)
    alarms = {rule for rule, result in twin.rules.items() if result.violated}
    broken = {rule: result.violated for rule, result in verdict.rules.items() if result.violated and rule not in alarms}
    counts: dict[str, Any] = {
        "false_alarms": twin.n_violations + twin.n_suspicions,
        "kernel_log": said,
        "probe": _probed(bug, faulty.with_suffix(".probed"), healthy.with_suffix(".probed")),
        "events": verdict.n_events,
        "healthy_events": twin.n_events,
    }
    findings = sorted((one for one in verdict.violations if one.rule in broken), key=lambda one: one.event_index)
    if not findings:
        return Result(bug.name, isa, "invisible", {}, **counts)
    severest = "violation" if any(one.severity == "violation" for one in findings) else "suspicion"
    first = next(one for one in findings if one.severity == severest)
    return Result(
        bug.name,
        isa,
        severest,
        broken,
        first=f"{first.rule}: expected {first.expected}, observed {first.observed}",
        source=first.source,
        distance=_distance(open_recording(faulty).events(), bug.at, first),
        named=named(bug, first.source),
        **counts,
    )


def named(bug: Bug, source: str) -> str:
    """Say what of the faulty code a finding's source names."""
    if any(re.search(rf"\b{re.escape(function)}\b", source) for function in bug.functions):
        return "function"
    files = {edit.file.removeprefix("arch/x86/kvm/").rsplit("/", maxsplit=1)[-1] for edit in bug.edits}
    return "file" if any(file in source for file in files) else "no"


def _verdict(path: Path) -> Comparison | None:
    try:
        return check_recording(open_recording(path)) if path.exists() else None
    except KvmtraceError:
        return None


def _probed(bug: Bug, faulty: Path, healthy: Path) -> str:
    """Say whether the probes beside the recordings tell the fault from its twin."""
    if not bug.probe_shows or not faulty.exists() or not healthy.exists():
        return ""
    first, second = (re.search(bug.probe_shows, path.read_text(errors="replace")) for path in (faulty, healthy))
    return "shown" if first and not second else "not shown"


def _kernels_word(log: str) -> str:
    for line in log.splitlines():
        if _CAUGHT.search(line):
            word = re.sub(r"^\[ *[\d.]+\] *", "", line)
            return re.sub(r"/\S*/(?=arch/|virt/)", "", word)[:100]
    return ""


def _distance(table: EventTable, at: Moment | None, first: Violation) -> int | None:
    """Count the VM-exits of the thread between the fault and the event found wrong."""
    row = at and moment(table, at)
    if row is None:
        return None
    exits = table.rows("kvm_exit")
    exits = exits[table.tid[exits] == first.tid]
    low, high = sorted((int(row), first.event_index))
    return int(np.count_nonzero((exits > low) & (exits <= high)))


def moment(table: EventTable, at: Moment) -> int | None:
    """Return the row of the event at which the faulty code has just run, None if there is none."""
    rows = table.rows(at.event)
    if at.field:
        rows = rows[np.asarray(table.field(at.event, at.field)).astype(np.uint64) == np.uint64(at.value)]
    return int(rows[at.nth - 1]) if len(rows) >= at.nth else None
