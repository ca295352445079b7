"""A brief run of the fuzzer (long: make fuzz), and every file it ever broke something with."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from writers.ring_buffer import page, record
from writers.trace_dat import TraceDatWriter

from fuzz.case import ALL, EVENTS, QMP, REPORT, Hang, Outcome, run_case
from fuzz.fuzz import COMPOSED, Fuzzer
from fuzz.loops_fuzz import build_target, result_of, start_target
from fuzz.minimise import minimised
from fuzz.mutations import mutate
from fuzz.own_build import COVERAGE, count_blocks, environment, own_build
from fuzz.seeds import composed, recorded_seeds, synthetic_seeds, vm_entry, vm_exit
from kvmtrace.formats import open_recording
from kvmtrace.formats.common.cursor import Cursor
from kvmtrace.formats.common.loss import LossCounter
from kvmtrace.formats.summary import is_summary

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


def test_blocks_of_the_compiled_loops_are_counted(tmp_path):
    folder = own_build(tmp_path, COVERAGE, edges=True)
    code = (
        "from fuzz.reached import NativeEdges; from fuzz.case import run_case, ALL; import sys; n = NativeEdges()\n"
        "before = len(n.blocks()); run_case(sys.argv[1], ALL)\n"
        "print(before, len(n.blocks()), n.grew(), n.grew())"
    )
    path = tmp_path / "seed"
    path.write_bytes(SEEDS["trace.dat-v6"])
    command = [sys.executable, "-c", code, str(path)]
    env = environment(folder, sanitized=False)
    env["PYTHONPATH"] += f":{Path(__file__).parents[1]}"
    before, after, *grew = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert int(before) < 30  # of the module itself
    assert grew == ["True", "False"]
    assert 50 < int(after) < count_blocks(next(folder.glob("kvmtrace/_native/*.so")))


class TestTheLoopsAlone:
    """libFuzzer runs them without Python; an access astray ends it."""

    def test_they_hold(self, tmp_path):
        program = build_target(tmp_path)
        assert start_target(program, tmp_path, "-runs=4000", "-seed=1").wait() == 0
        result = result_of(tmp_path)
        assert result.executions >= 4000
        assert 300 < result.edges < result.of_edges
        assert result.crashes == ()

    def test_a_missing_bound_is_found(self, tmp_path):
        change = ("field_bytes.c", "if (at >= 0 && at + size <= n_bytes) {", "if (at + size <= n_bytes) {")
        program = build_target(tmp_path, change)
        assert start_target(program, tmp_path, "-runs=200000", "-seed=1").wait() != 0
        assert len(result_of(tmp_path).crashes) == 1


class TestTheFuzzer:
    """It finds what is planted: errors, hangs, memory, silent cuts; and it is guided by what it reaches."""

    @pytest.fixture
    def fuzzer(self, tmp_path):
        return Fuzzer(tmp_path, 5, {"trace.dat-v6": SEEDS["trace.dat-v6"]})

    def test_inputs_that_reach_something_new_are_kept_and_used_again(self, tmp_path, fuzzer):
        before = len(fuzzer.reached.edges)
        for _ in range(60):
            fuzzer.step()
        assert len(fuzzer.reached.edges) > before + 50
        kept = {path.read_bytes() for path in (tmp_path / ".corpus").iterdir()}
        assert kept <= set(fuzzer.corpus["trace.dat-v6"]) | set(fuzzer.corpus[COMPOSED])
        assert len(kept) > 3
        assert fuzzer.findings == {}
        again = Fuzzer(tmp_path, 6, fuzzer.seeds)  # the next worker
        assert sum(map(len, again.corpus.values())) > 3
        assert len(again.reached.edges) > before + 50

    def test_an_error_is_kept_minimised(self, tmp_path, monkeypatch, fuzzer):
        number = Cursor.number

        def planted(cursor, *args):
            value = number(cursor, *args)
            return value // (value < 1 << 31)

        monkeypatch.setattr(Cursor, "number", planted)
        monkeypatch.setattr("fuzz.fuzz.minimised", lambda data, same, seconds: minimised(data, same, seconds=0.2))
        for _ in range(200):
            fuzzer.execute(mutate(fuzzer.rng, SEEDS["trace.dat-v6"]), EVENTS, "trace.dat-v6")
        found = [path for path in tmp_path.glob("ZeroDivisionError*") if path.suffix != ".txt"]
        assert found
        assert found[0].stat().st_size < len(SEEDS["trace.dat-v6"])
        assert sum(fuzzer.findings.values()) >= len(found)

    def test_a_cut_that_nobody_states_is_found(self, tmp_path, monkeypatch):
        pages = b"".join(page(1000 * i, [record(vm_entry(i), 7), record(vm_exit(i), 7)]) for i in range(1, 9))
        fuzzer = Fuzzer(tmp_path, 5, {"healthy": TraceDatWriter([pages]).v6()})
        for _ in range(60):
            fuzzer.check_cut()
        assert fuzzer.findings == {}
        monkeypatch.setattr(LossCounter, "add_faults", lambda *args, **more: None)
        for _ in range(60):
            fuzzer.check_cut()
        assert (tmp_path / "cut-healthy").exists()

    def test_a_hang_is_found(self, run, monkeypatch):
        def spin(path):
            while True:
                pass

        monkeypatch.setattr("fuzz.case.CPU_SECONDS", 0.2)
        monkeypatch.setattr("fuzz.case.open_recording", spin)
        with pytest.raises(Hang):
            run(b"x")

    def test_memory_is_bounded_by_the_files_size(self, run, monkeypatch):
        monkeypatch.setattr("fuzz.case.open_recording", lambda path: bytearray(1 << 30))
        with pytest.raises(MemoryError):
            run(b"x")

    def test_every_format_is_among_the_seeds(self):
        names = {**SEEDS, **recorded_seeds()}
        formats = {open_format(data) for data in names.values()}
        assert formats == {
            "trace.dat",
            "perf.data",
            "kvmtrace-bpf",
            "ftrace-text",
            "parquet",
            "arrow",
            "summary",
            "QMP",
        }
        assert {"trace.dat-v7-zlib", "trace.dat-v7-zstd", "perf.data-zstd"} <= set(names)


def open_format(data: bytes) -> str:
    """Return what a file is recognised as."""
    if is_summary(data):
        return "summary"
    if data.startswith(QMP):
        return "QMP"
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        found = open_recording(file.name).capture.format
    return {b"PAR1": "parquet", b"ARRO": "arrow"}.get(data[:4], found)
