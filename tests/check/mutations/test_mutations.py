"""Every edit of a clean recording is reported by the checker, or listed with the reason why it cannot be.

The full run prints the kill rates: `pytest -m slow -s tests/check/mutations`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mutations.harness import Tally, render, run
from mutations.undetectable import NOT_YET, UNDETECTABLE, why_undetectable

# the bundled guests, recorded with all events of the model; a Linux boot adds reasons but takes minutes
FIXTURES = sorted(
    path
    for path in (Path(__file__).parents[3] / "fixtures").rglob("*.dat")
    if not {"linux", "storm"}.intersection(path.stem.split("-"))
)


def complaint(tally: Tally) -> str:
    """Return the mutations that passed without an excuse, one line each."""
    lines = [f"{outcome.base}: {outcome.mutation}" for outcome in tally.missed]
    return "\n".join([f"{len(lines)} of {len(tally.outcomes)} mutations passed:", *lines[:60]])


def test_there_are_recordings_of_all_isas() -> None:
    names = " ".join(path.name for path in FIXTURES)
    assert "vmx" in names
    assert "svm" in names
    assert "arm64" in names


@pytest.mark.parametrize("guest", ["dabt-split", "smp", "undefined"])
def test_edits_of_arm64_recordings_are_seen(guest: str) -> None:
    """At least 95 % of what can be seen is asked for; all of it is seen."""
    tally = run([path for path in FIXTURES if path.stem == f"arm64-6.1-{guest}"], per_group=1)
    assert len(tally.outcomes) > 80
    assert not tally.missed, complaint(tally)


def test_a_sample_of_all_mutations() -> None:
    tally = run(FIXTURES, per_group=1, limit=500)
    assert len(tally.outcomes) > 300
    assert not tally.missed, complaint(tally)


@pytest.mark.slow
def test_all_kinds_of_mutations_everywhere() -> None:
    tally = run(FIXTURES, per_group=2)
    print(render(tally))
    assert not tally.missed, complaint(tally)
    assert tally.kill_rate() == 1
    gaps = sum(outcome.excuse.startswith("not yet") for outcome in tally.outcomes)
    assert gaps < 0.02 * len(tally.outcomes)


@pytest.mark.slow
def test_no_excuse_is_stale() -> None:
    """Each excuse is needed: some mutation of its class does pass."""
    tally = run(FIXTURES, per_group=2, seed=2)
    used = {outcome.excuse for outcome in tally.outcomes if outcome.excuse}
    stale = [
        row.reason
        for row in (*UNDETECTABLE, *NOT_YET)
        if row.reason not in used and f"not yet: {row.reason}" not in used
    ]
    assert not stale


def test_excuses_have_reasons() -> None:
    assert all(len(row.reason) > 20 for row in (*UNDETECTABLE, *NOT_YET))
    assert why_undetectable.__doc__
