"""The report document's `replay`: a bundled guest's prediction beside its recording, every step in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from kvmtrace.predict.align import AlignedStep, Alignment, Replay


@dataclass(frozen=True)
class ReplayedStep:
    """One line of an alignment."""

    outcome: str  # "matched" "differs" "missing" "unexpected" "asynchronous" "absent"
    address: int | None  # linear address of the instruction that it belongs to
    text: str  # that instruction, "" where none is predicted
    predicted: str  # the predicted event, "" if none
    observed: str  # the recorded event, "" if none
    row: int | None  # of the recorded event, in the recording
    ts_ns: int | None
    note: str  # which fields differ, or why it is asynchronous, or what the step is for


@dataclass(frozen=True)
class ReplayedVcpu:
    """A vCPU's prediction beside the events of its thread."""

    vcpu_id: int
    tid: int
    n_steps: int  # predicted steps, those that were absent because of timing left out
    n_matched: int  # steps whose event and fields were recorded as predicted
    n_asynchronous: int  # recorded events that the host caused
    steps: tuple[ReplayedStep, ...]


@dataclass(frozen=True)
class ReplayDifference:
    """A step in which prediction and recording disagree, and whose it is."""

    vcpu_id: int
    outcome: str  # as in ReplayedStep
    address: int | None
    text: str
    predicted: str
    observed: str
    row: int | None
    ts_ns: int | None
    note: str


@dataclass(frozen=True)
class ReplayedGuest:
    """A bundled guest, predicted and recorded."""

    guest: str
    arguments: dict[str, int]
    isa: str
    events: tuple[str, ...]  # the event names that prediction and recording have in common
    n_steps: int  # sum over the vCPUs
    n_matched: int
    n_lost: int | None  # events the recorder lost (null: unknown how many); differences may be theirs
    vcpus: tuple[ReplayedVcpu, ...] = ()
    differences: tuple[ReplayDifference, ...] = ()


def _step(step: AlignedStep) -> ReplayedStep:
    return ReplayedStep(
        step.outcome, step.address, step.text, step.predicted, step.observed, step.row, step.ts_ns, step.note
    )


def _vcpu(vcpu: Alignment, *, listed: bool) -> ReplayedVcpu:
    steps = tuple(_step(step) for step in vcpu.steps) if listed else ()
    return ReplayedVcpu(vcpu.vcpu_id, vcpu.tid, vcpu.n_steps, vcpu.n_matched, vcpu.n_asynchronous, steps)


def replayed(replay: Replay, *, every_step: bool = True) -> ReplayedGuest:
    """Return a replay as the document has it.

    Parameters
    ----------
    every_step : list the steps also where prediction and recording nowhere disagree
    """
    listed = every_step or any(vcpu.differences for vcpu in replay.vcpus)
    return ReplayedGuest(
        guest=replay.guest,
        arguments=replay.arguments,
        isa=replay.isa,
        events=replay.events,
        n_steps=replay.n_steps,
        n_matched=replay.n_matched,
        n_lost=replay.n_lost,
        vcpus=tuple(_vcpu(vcpu, listed=listed) for vcpu in replay.vcpus),
        differences=tuple(
            ReplayDifference(vcpu.vcpu_id, **vars(_step(step))) for vcpu in replay.vcpus for step in vcpu.differences
        ),
    )
