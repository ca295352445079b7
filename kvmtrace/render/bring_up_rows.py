"""A VM's construction as rows to read: the VMM's steps and its calls in one order, repetitions in one row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ASKED = "KVM_CHECK_EXTENSION"  # QEMU asks for some 80 capabilities: told apart from the construction
RETURN = "_return"
OUTCOMES = ("violation", "unknown", "explained")  # worst first


@dataclass(frozen=True)
class TimelineRow:
    """One step, or several like it in a row.

    Parameters
    ----------
    ts_ns, dur_ns : begin of the first, time in all of them; None if not recorded
    step : "KVM_CREATE_VM", "mmap kvm_run", "accel_find (kvm)"
    fd, ret : None for a step of the VMM
    n : how many in a row
    is_landmark : makes an object, runs a vCPU or belongs to the VMM; never left out
    """

    ts_ns: int
    dur_ns: int | None
    tid: int
    step: str
    fd: int | None
    ret: int | None
    object: str
    makes: str
    verdict: str
    sentence: str
    is_landmark: bool
    n: int = 1


@dataclass(frozen=True)
class Outcome:
    """What did not simply succeed: the same words once, `n` times seen, on `objects`."""

    verdict: str
    name: str
    ret: int | None
    sentence: str
    source: str
    objects: tuple[str, ...]
    n: int


def _call_row(step: Any) -> TimelineRow:
    words = step.name if step.call in {"ioctl", step.name} else f"{step.call} {step.name}"
    landmark = bool(step.makes) or step.call != "ioctl" or step.name == "KVM_RUN"
    return TimelineRow(
        step.ts_ns,
        step.dur_ns,
        step.tid,
        words,
        step.fd,
        step.ret,
        step.object,
        step.makes,
        step.verdict,
        step.sentence,
        landmark,
    )


def _vmm_rows(steps: Sequence[Any]) -> list[tuple[int, TimelineRow]]:
    """Return (event index, row) of each step; a function whose return was probed has a duration."""
    rows: list[tuple[int, TimelineRow]] = []
    for i, step in enumerate(steps):
        dur_ns = next(
            (
                later.ts_ns - step.ts_ns
                for later in steps[i + 1 :]
                if later.role == step.role + RETURN and later.tid == step.tid
            ),
            None,
        )
        # "accel kvm" -> "(kvm)": of a single argument the value tells enough
        words = step.argument if ", " in step.argument else step.argument.partition(" ")[2]
        argument = f" ({words})" if words else ""
        rows.append(
            (
                step.event_index,
                TimelineRow(
                    step.ts_ns,
                    dur_ns,
                    step.tid,
                    step.role.removeprefix("vmm_") + argument,
                    None,
                    None,
                    "",
                    "",
                    "",
                    step.sentence,
                    is_landmark=True,
                ),
            )
        )
    return rows


def _joined(rows: Iterable[TimelineRow]) -> list[TimelineRow]:
    """Join calls that repeat the one before on the same thread and object, with the same outcome."""
    made: list[TimelineRow] = []
    for row in rows:
        last = made[-1] if made else None
        if last is not None and last.fd is not None and _alike(last) == _alike(row):
            known = [dur for dur in (last.dur_ns, row.dur_ns) if dur is not None]
            made[-1] = replace(last, dur_ns=sum(known) if known else None, n=last.n + 1)
        else:
            made.append(row)
    return made


def _alike(row: TimelineRow) -> tuple[object, ...]:
    return row.tid, row.step, row.fd, row.object, row.makes, row.verdict, row.sentence, row.ret


def timeline(bring_up: Any) -> list[TimelineRow]:
    """Return the construction in recorded order, without the questions for capabilities."""
    rows = [(step.event_index, _call_row(step)) for step in bring_up.steps if step.name != ASKED]
    if bring_up.vmm is not None:
        rows += _vmm_rows(bring_up.vmm.steps)
    return _joined(row for _, row in sorted(rows, key=lambda pair: pair[0]))


def chosen(rows: Sequence[TimelineRow], limit: int) -> list[TimelineRow]:
    """Return at most `limit` rows in order: the landmarks, then what room is left for."""
    order = sorted(range(len(rows)), key=lambda i: (not rows[i].is_landmark, i))
    return [rows[i] for i in sorted(order[:limit])]


def outcomes(bring_up: Any) -> list[Outcome]:
    """Return every distinct outcome but "ok", worst first."""
    found: dict[tuple[str, str, int | None, str, str], list[Any]] = {}
    for step in bring_up.steps:
        if step.verdict in OUTCOMES:
            found.setdefault((step.verdict, step.name, step.ret, step.sentence, step.source), []).append(step)
    made = [
        Outcome(*key, objects=tuple(dict.fromkeys(step.object for step in steps if step.object)), n=len(steps))
        for key, steps in found.items()
    ]
    return sorted(made, key=lambda outcome: OUTCOMES.index(outcome.verdict))
