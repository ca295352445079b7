"""Summarising: the same numbers whatever the engine, workers and order; what fails is a row, never the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.fleet.executors import Engine, Failed, run_tasks
from kvmtrace.fleet.reduce import Fleet
from kvmtrace.fleet.sources import find_sources
from kvmtrace.fleet.store import Store
from kvmtrace.fleet.summarizing import summarize_all
from kvmtrace.formats import open_recording
from kvmtrace.report.build import build_report
from kvmtrace.stats.exponential_histogram import RELATIVE_ERROR, merged, quantile_ns

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
SOURCES = [*sorted(map(str, FIXTURES.glob("*-lifecycle.dat"))), str(FIXTURES / "svm-6.12-linux-2vcpu.dat")]
SUMS = """
SELECT host, isa, exit_reason, sum(count)::BIGINT AS count, sum(samples)::BIGINT AS samples,
       sum(total_ns)::BIGINT AS total_ns, min(min_ns) AS min_ns, max(max_ns) AS max_ns,
       sum(squares_ns2) AS squares, sum(to_userspace)::BIGINT AS to_userspace
FROM exits GROUP BY ALL ORDER BY ALL
"""


def rows_of(dest: Path) -> dict[str, list[dict[str, object]]]:
    """Return the content of all summaries, by checksum."""
    store = Store(str(dest))
    return {path.rsplit("/", 1)[-1]: pq.ParquetFile(path).read().to_pylist() for path in store.objects("summaries")}


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dest")
    progress = summarize_all(Engine(workers=1), SOURCES, str(folder))
    assert progress.counts == {"made": len(SOURCES)}
    return folder


@pytest.mark.parametrize("engine", [Engine(workers=2), Engine("dask", workers=2)], ids=["local", "dask"])
def test_engines_and_order_change_nothing(dest: Path, engine: Engine, tmp_path: Path) -> None:
    progress = summarize_all(engine, SOURCES[::-1], str(tmp_path))
    assert progress.counts == {"made": len(SOURCES)}
    assert rows_of(tmp_path) == rows_of(dest)
    with Fleet(str(dest)) as one, Fleet(str(tmp_path)) as other:
        assert one.arrow(SUMS).equals(other.arrow(SUMS))


def test_numbers_are_those_of_one_report(dest: Path) -> None:
    source = SOURCES[-1]
    expected = {(row.isa, row.exit_reason): row for row in build_report(open_recording(source)).exits}
    with Fleet(str(dest)) as fleet:
        fleet.narrow(f"source = '{source}'")
        sums = fleet.arrow(SUMS).to_pylist()
        bins = fleet.arrow("SELECT exit_reason, buckets, counts FROM exits").to_pylist()
    assert len(sums) == len(expected)
    for row in sums:
        told = expected[row["isa"], row["exit_reason"]]
        for name in ("count", "samples", "min_ns", "max_ns", "to_userspace"):
            assert row[name] == getattr(told, name)
        assert row["total_ns"] == (told.total_ns or 0)
        own = [
            dict(zip(b["buckets"], b["counts"], strict=True)) for b in bins if b["exit_reason"] == row["exit_reason"]
        ]
        for q, exact in ((0.5, told.p50_ns), (0.99, told.p99_ns)):
            if told.samples > 200:  # ranks of few samples are defined differently
                found = quantile_ns(merged(own), q)
                assert found is not None
                assert abs(found / exact - 1) <= 2.5 * RELATIVE_ERROR


def test_what_is_there_is_not_made_again(dest: Path) -> None:
    before = {path: os.stat(path).st_mtime_ns for path in Store(str(dest)).objects("summaries")}
    progress = summarize_all(Engine(workers=1), SOURCES, str(dest))
    assert progress.counts == {"present": len(SOURCES)}
    assert before == {path: os.stat(path).st_mtime_ns for path in Store(str(dest)).objects("summaries")}


def test_failures_are_rows_and_go_when_mended(tmp_path: Path) -> None:
    bad, gone, good = tmp_path / "bad.dat", tmp_path / "gone.dat", tmp_path / "good.dat"
    bad.write_bytes(b"no trace at all")
    shutil.copy(SOURCES[0], good)
    folder = tmp_path / "dest"
    progress = summarize_all(Engine(workers=1), [str(bad), str(gone), str(good)], str(folder))
    assert progress.counts == {"failed": 2, "made": 1}
    with Fleet(str(folder)) as fleet:
        failures = fleet.arrow("SELECT * FROM failures ORDER BY source").to_pylist()
    assert [(Path(row["source"]).name, row["kind"]) for row in failures] == [
        ("bad.dat", "FormatError"),
        ("gone.dat", "FileNotFoundError"),
    ]
    shutil.copy(SOURCES[1], gone)
    assert summarize_all(Engine(workers=1), [str(gone)], str(folder)).counts == {"made": 1}
    assert len(Store(str(folder)).objects("failures")) == 1


def die_or_tell(argument: str, *, folder: str) -> str:
    """Kill this process for the argument "bad"; note each call."""
    with Path(folder, f"{argument}-{os.getpid()}").open("w"):
        pass
    if argument == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return argument.upper()


@pytest.mark.parametrize("engine", [Engine(workers=2), Engine("dask", workers=2)], ids=["local", "dask"])
def test_a_task_that_kills_its_worker_is_found_and_the_others_are_done(engine: Engine, tmp_path: Path) -> None:
    results: dict[str, object] = {}
    arguments = [*(f"good{i}" for i in range(6)), "bad", *(f"more{i}" for i in range(6))]
    run_tasks(engine, partial(die_or_tell, folder=str(tmp_path)), arguments, results.__setitem__)
    assert isinstance(results.pop("bad"), Failed)
    assert results == {name: name.upper() for name in arguments if name != "bad"}


def die_once(argument: str, *, folder: str) -> str:
    """Kill the worker the first time that any task runs."""
    marker = Path(folder, "died")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return argument


@pytest.mark.parametrize("engine", [Engine(workers=2), Engine("dask", workers=2)], ids=["local", "dask"])
def test_a_worker_killed_in_mid_run_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    results: dict[str, object] = {}
    run_tasks(engine, partial(die_once, folder=str(tmp_path)), list("abcdefgh"), results.__setitem__)
    assert results == {letter: letter for letter in "abcdefgh"}


def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmtrace.fleet.executors.CONNECT_SECONDS", 0.5)
    with pytest.raises(CapabilityError, match="no Dask scheduler answers at"):
        run_tasks(Engine("dask", scheduler="tcp://127.0.0.1:9"), str, ["x"], lambda *_: None)


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.dat", "a.json", ".hidden", "sub/b.dat"):
        (tmp_path / name).touch()
    everything = [str(tmp_path / "a.dat"), str(tmp_path / "sub" / "b.dat")]
    assert find_sources([str(tmp_path)]) == everything
    assert find_sources([str(tmp_path / "*.dat"), str(tmp_path / "a.dat")]) == everything[:1]
    assert find_sources([f"file://{tmp_path}/*.dat"]) == [f"file://{tmp_path}/a.dat"]
    with pytest.raises(UsageError, match="no recording there"):
        find_sources([str(tmp_path / "*.nothing")])


def kvmtrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kvmtrace", *arguments], capture_output=True, text=True, check=False)


def test_the_commands(dest: Path, tmp_path: Path) -> None:
    text = kvmtrace("fleet", "report", str(dest))
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith(f"kvmtrace fleet report: {dest}\n  {len(SOURCES)} recordings of 2 hosts")
    assert max(map(len, text.stdout.splitlines())) <= 100 + len(str(dest))
    document = json.loads(kvmtrace("fleet", "report", str(dest), "--format", "json", "--by", "host").stdout)
    assert document["schema"] == "kvmtrace.fleet-report/1"
    assert document["recordings"] == len(SOURCES)
    page = tmp_path / "fleet.html"
    assert kvmtrace("fleet", "report", str(dest), "--format", "html", "-o", str(page)).returncode == 0
    assert "http://" not in page.read_text().replace("http://www.w3.org", "")
    compared = kvmtrace("fleet", "compare", str(dest), "--base", "isa = 'svm'", "--new", "isa = 'vmx'")
    assert compared.returncode == 0, compared.stderr
    assert "Not compared:" in compared.stdout
    csv = kvmtrace("fleet", "sql", str(dest), "SELECT count(*) AS n FROM recordings")
    assert csv.stdout.split() == ['"n"', str(len(SOURCES))]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("report", "{tmp}"), 3, "summaries made by"),
        (("report", "{dest}", "--by", "colour"), 2, "no such column"),
        (("report", "{dest}", "--where", "selekt"), 2, "selekt"),
        (("report", "{dest}", "--where", "host = 'nobody'"), 2, "no recording for which"),
        (("sql", "{dest}", "DROP nonsense"), 2, "nonsense"),
        (("summarize", "{tmp}/nothing-*", "-o", "{tmp}/d"), 2, "no recording there"),
        (("summarize", "{dest}", "-o", "nosuch://x"), 2, "nosuch"),
        (("summarize", "x", "-o", "{tmp}/d", "--scheduler", "tcp://x:1"), 2, "--engine dask"),
    ],
)
def test_bad_use_is_one_line(arguments: tuple[str, ...], code: int, words: str, dest: Path, tmp_path: Path) -> None:
    done = kvmtrace("fleet", *(text.format(tmp=tmp_path, dest=dest) for text in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
