"""A brief run of the fuzzer (long: make fuzz), and every file it ever broke something with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fuzz.case import ALL, EVENTS, REPORT, Outcome, run_case
from fuzz.mutations import mutate
from fuzz.seeds import composed, synthetic_seeds

CRASHERS = sorted((Path(__file__).parent / "crashers").glob("*"))
N_CASES = 40
SEEDS = synthetic_seeds()


@pytest.fixture
def run(tmp_path):
    def run_data(data: bytes, depth: int = REPORT) -> Outcome:
        path = tmp_path / "case"
        path.write_bytes(data)
        return run_case(str(path), depth)
    return run_data


@pytest.mark.parametrize("name", SEEDS)
def test_mutated_files_are_read_or_refused(run, name):
    rng = random.Random(name)
    whole = run(SEEDS[name], ALL)
    assert whole.n_events is not None, whole.error
    outcomes = [run(mutate(rng, SEEDS[name]), REPORT if i % 4 == 0 else EVENTS) for i in range(N_CASES)]
    assert any(o.n_events is None for o in outcomes)
    assert any(o.n_events is not None for o in outcomes)


def test_damage_inside_compressed_parts(run):
    rng = random.Random(1)
    outcomes = [run(composed(rng, mutate), EVENTS) for _ in range(2 * N_CASES)]
    assert any(o.n_events for o in outcomes)


@pytest.mark.parametrize("path", CRASHERS, ids=lambda path: path.name)
def test_what_once_broke_something(path):
    run_case(str(path), ALL)
