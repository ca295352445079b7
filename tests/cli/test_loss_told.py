"""What record says of what it lost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmtrace.cli.recording_told import describe_loss


@pytest.mark.parametrize(
    ("lost", "loss", "told"),
    [
        (None, {}, "an unknown number of events"),
        (0, {"by_cpu": {}}, "0 events"),
        (3, {"by_cpu": {"0": 1, "7": 2}}, "3 events (CPU 0: 1, CPU 7: 2)"),
        (
            5,
            {"by_cpu": {}, "missed_in_interrupts": {"sched_migrate_task": 5}},
            "5 events (sched_migrate_task: up to 5 in interrupts)",
        ),
    ],
)
def test_loss(lost: int | None, loss: dict[str, object], told: str) -> None:
    assert describe_loss(SimpleNamespace(lost=lost, meta={"loss": loss})) == told  # type: ignore[arg-type]
