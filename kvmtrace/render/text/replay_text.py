"""A replay in words: the verdict first, then every difference with what surrounds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.predict.align import ASYNCHRONOUS, DIFFERENCES, MATCHED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.predict.replayed import ReplayedGuest, ReplayedStep, ReplayedVcpu

_MARK = {MATCHED: " ", ASYNCHRONOUS: "~", "absent": "?", "differs": "!", "missing": "-", "unexpected": "+"}
CONTEXT = 3


def describe_replay(replay: ReplayedGuest) -> str:
    """Return the verdict as one line."""
    what = f"{replay.guest} on {replay.isa}: {replay.n_matched:,} of {replay.n_steps:,} predicted steps recorded"
    n_asynchronous = sum(vcpu.n_asynchronous for vcpu in replay.vcpus)
    n_different = len(replay.differences)
    verdict = "no difference" if not n_different else f"{n_different:,} difference{'s' if n_different > 1 else ''}"
    lost = "" if replay.n_lost == 0 else f"; {replay.n_lost or 'some'} events were lost"
    return f"{what}, {verdict}, {n_asynchronous:,} asynchronous events{lost}"


def render_replay(replay: ReplayedGuest, *, everything: bool = False, max_differences: int = 20) -> str:
    """Return a replay as text.

    Parameters
    ----------
    everything : show every step, not only the differences and their surroundings
    max_differences : of more, only the number is told
    """
    lines = [describe_replay(replay)]
    for vcpu in replay.vcpus:
        different = [step for step in vcpu.steps if step.outcome in DIFFERENCES]
        lines.append(
            f"vCPU {vcpu.vcpu_id} (thread {vcpu.tid}): {vcpu.n_matched:,} of {vcpu.n_steps:,} steps, "
            f"{len(different):,} differences"
        )
        shown = range(len(vcpu.steps)) if everything else _around_differences(vcpu, max_differences)
        lines += _render_steps(vcpu, shown)
        if not everything and len(different) > max_differences:
            lines.append(f"  ... and {len(different) - max_differences:,} more differences")
    if everything or replay.differences:
        lines.append(
            "marks: ! a field differs, - predicted but not recorded, + recorded but not predicted, ~ asynchronous"
        )
    return "\n".join(lines) + "\n"


def _around_differences(vcpu: ReplayedVcpu, limit: int) -> list[int]:
    places = [index for index, step in enumerate(vcpu.steps) if step.outcome in DIFFERENCES][:limit]
    shown = {near for place in places for near in range(place - CONTEXT, place + CONTEXT + 1)}
    return sorted(index for index in shown if 0 <= index < len(vcpu.steps))


def _render_steps(vcpu: ReplayedVcpu, indices: range | list[int]) -> Iterator[str]:
    instruction, before = "", -1
    for index in indices:
        step = vcpu.steps[index]
        if before >= 0 and index != before + 1:
            yield "  ..."
        before = index
        here = f"{step.address:04x}  {step.text}" if step.text and step.address is not None else ""
        if here and here != instruction:
            yield f"  {here}"
            instruction = here
        yield from _render_step(step)


def _render_step(step: ReplayedStep) -> Iterator[str]:
    mark = _MARK[step.outcome]
    if step.outcome == MATCHED:
        yield f"   {mark}   {step.observed}"
    elif step.outcome == "differs":
        yield f"   {mark}   predicted {step.predicted}"
        yield f"       recorded  {step.observed}   ({step.note})"
    else:
        note = f"   ({step.note})" if step.note else ""
        yield f"   {mark}   {step.predicted or step.observed}{note}"
