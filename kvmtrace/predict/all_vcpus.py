"""All vCPUs of a guest, executed together: what the predictions of every architecture share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.predict.predicted_steps import Story
from kvmtrace.predict.story import Prediction
from kvmtrace.workload.devices import Devices
from kvmtrace.workload.guests import RAM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.predict.story import Facts
    from kvmtrace.workload import Guest
    from kvmtrace.workload.listing import Line

PAGE = 0x1000


class AllVcpus:
    """The vCPUs of a guest; each writes its own story.

    Parameters
    ----------
    guest, facts, max_steps : see `guest_prediction.predict`

    Attributes
    ----------
    memory : RAM, with the listing in it
    mapped : numbers of the pages that KVM has mapped for the guest; all vCPUs share one table
    stories, devices : one per vCPU
    """

    def __init__(self, guest: Guest, facts: Facts, max_steps: int) -> None:
        self.guest = guest
        self.facts = facts
        self.max_steps = max_steps
        self.memory = bytearray(RAM_BYTES)
        guest.listing.write_to(self.memory)
        self.mapped: set[int] = set()
        self.stories = [Story(vcpu_id, facts) for vcpu_id in range(guest.n_vcpus)]
        self.devices = [Devices() for _ in self.stories]

    def runs(self) -> list[Iterator[None]]:
        """Return the execution of each vCPU, which yields for as long as it waits for another."""
        raise NotImplementedError

    def run(self) -> None:
        """Execute all vCPUs to their end, each until it has to wait for another."""
        runs = self.runs()
        while runs:
            before = sum(len(story) for story in self.stories)
            runs = [run for run in runs if next(run, "ended") is None]
            if before == sum(len(story) for story in self.stories):
                raise AssertionError(f"the vCPUs of {self.guest.name} wait for each other")

    def predictions(self) -> tuple[Prediction, ...]:
        """Return what was written down."""
        return tuple(Prediction(story.vcpu_id, story.finish()) for story in self.stories)

    def begin(self, vcpu_id: int, line: Line, rip: int) -> Story:
        """Begin an instruction; return the vCPU's story."""
        story = self.stories[vcpu_id]
        if len(story) > self.max_steps:
            raise UsageError(f"the run of {self.guest.name} is longer than {self.max_steps} predicted events")
        story.instruction(line, rip)
        return story

    def leave_and_return(self, vcpu_id: int, reason: int, why: str) -> None:
        """Leave to userspace, which serves the guest and calls KVM_RUN again."""
        story = self.stories[vcpu_id]
        story.leave(reason, 0, why)
        story.begin_run()
