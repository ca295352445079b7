"""Summarising: the same numbers whatever the engine, workers and order; what fails is a row, never the end."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from fuzz.seeds import summary as live_summary

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.fleet.executors import Engine, Failed, run_tasks
from kvmtrace.fleet.reduce import TABLES, Fleet
from kvmtrace.fleet.sources import find_sources
from kvmtrace.fleet.staging import ObjectReader
from kvmtrace.fleet.store import Store
from kvmtrace.fleet.summarize import summarize
from kvmtrace.fleet.summarizing import summarize_all, summarize_source
from kvmtrace.formats import open_recording
from kvmtrace.formats.arrow.arrow_writing import write_parquet
from kvmtrace.report.build import build_report
from kvmtrace.stats.exponential_histogram import RELATIVE_ERROR, merged, quantile_ns
from kvmtrace.table.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from kvmtrace.table.event_table import EventTable

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
SOURCES = [*sorted(map(str, FIXTURES.glob("[sv]*m*-lifecycle.dat"))), str(FIXTURES / "svm-6.12-linux-2vcpu.dat")]
SUMS = """
SELECT host, isa, exit_reason, sum(count)::BIGINT AS count, sum(samples)::BIGINT AS samples,
       sum(total_ns)::BIGINT AS total_ns, min(min_ns) AS min_ns, max(max_ns) AS max_ns,
       sum(squares_ns2) AS squares, sum(to_userspace)::BIGINT AS to_userspace
FROM exits GROUP BY ALL ORDER BY ALL
"""
HISTOGRAMS = """
SELECT isa, exit_reason, bucket, sum(n)::BIGINT AS n
FROM (SELECT isa, exit_reason, unnest(buckets) AS bucket, unnest(counts) AS n FROM exits) GROUP BY ALL ORDER BY ALL
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


@pytest.fixture(scope="module")
def all_fixtures(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    sources = sorted(map(str, FIXTURES.glob("*.dat")))
    folder = tmp_path_factory.mktemp("all")
    assert summarize_all(Engine(workers=1), sources, str(folder)).counts == {"made": len(sources)}
    return sources, folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("engine", ["local", "dask"])
def test_all_fixtures_in_any_order(
    engine: str, workers: int, all_fixtures: tuple[list[str], Path], tmp_path: Path
) -> None:
    sources, folder = all_fixtures
    assert len(sources) >= 36
    shuffled = random.Random(f"{engine}{workers}").sample(sources, len(sources))
    summarize_all(Engine(engine, workers=workers), shuffled, str(tmp_path))
    assert rows_of(tmp_path) == rows_of(folder)
    with Fleet(str(folder)) as one, Fleet(str(tmp_path)) as other:
        for query in (SUMS, HISTOGRAMS):
            assert one.arrow(query).equals(other.arrow(query))


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


def test_each_exit_is_of_a_level(dest: Path) -> None:
    """Of kvm_nested_vmexit's VM-exits level 2, of all others level 1; where it was not recorded, none."""
    nested = ROOT / "tests" / "check" / "recorded" / "svm-6.12-nested-hyperv.dat"
    rows = summarize(nested, str(nested))["exits"]
    events = open_recording(nested).events()
    assert sum(row["count"] for row in rows if row["level"] == 2) == events.count("kvm_nested_vmexit") > 0
    assert sum(row["count"] for row in rows) == events.count("kvm_exit")
    assert {row["level"] for row in rows} == {1, 2}
    with Fleet(str(dest)) as fleet:
        levels = fleet.arrow("SELECT DISTINCT level FROM exits WHERE isa IN ('vmx', 'svm')").to_pylist()
    assert levels == [{"level": 1}]
    untold = ROOT / "tests" / "cases" / "cpuid.txt"
    assert {row["level"] for row in summarize(untold, str(untold))["exits"]} == {None}


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
    assert kvmtrace("fleet", "report", str(dest), "--format", "html", "-o", str(page)).stderr == ""
    assert "http://" not in page.read_text().replace("http://www.w3.org", "")
    compared = kvmtrace("fleet", "compare", str(dest), "--base", "isa = 'svm'", "--new", "isa = 'vmx'")
    assert compared.returncode == 0, compared.stderr
    assert "Not compared:" in compared.stdout
    csv = kvmtrace("fleet", "sql", str(dest), "SELECT count(*) AS n FROM recordings")
    assert csv.stdout.split() == ['"n"', str(len(SOURCES))]


def test_a_query_reaches_the_summaries_alone(dest: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "out.csv", tmp_path / "own.csv"
    own.write_text("host\nnobody\n")
    for query in (f"COPY exits TO '{out}'", f"SELECT * FROM read_csv('{own}')", "SET enable_external_access = true"):
        with Fleet(str(dest)) as fleet:
            fleet.lock(query)
            with pytest.raises(UsageError):
                fleet.csv(query)
    with Fleet(str(dest)) as fleet, pytest.raises(UsageError, match="more than a condition"):
        fleet.narrow(f"true; COPY recordings TO '{out}'")
    assert not out.exists()


def test_tables_are_read_when_a_query_names_them(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object once for all that is asked at once, and of a part only what lies in it."""
    read: list[tuple[int, set[str]]] = []
    whole = ObjectReader.read

    def noted(self: ObjectReader, table: str, objects: list[str], columns: list[str], schema: pa.Schema) -> None:
        read.append((len(objects), set(columns) & {"exits", "vcpus", "rules"}))
        whole(self, table, objects, columns, schema)

    monkeypatch.setattr(ObjectReader, "read", noted)
    monkeypatch.setattr("kvmtrace.fleet.staging.AT_ONCE", 2)
    n = len(SOURCES)
    with Fleet(str(dest)) as fleet:
        fleet.sql("SELECT * FROM exits JOIN vcpus USING (checksum)")
        fleet.sql("SELECT * FROM Exits")
        part = fleet.part("isa = 'vmx'")
        others = fleet.part("isa = 'svm'").part(f"source <> '{SOURCES[-1]}'")
        assert set(part.sql("SELECT DISTINCT isa FROM exits").isa) == {"vmx"}
        rules = part.sql("SELECT DISTINCT source FROM rules")
        assert part.n_recordings + others.n_recordings + 1 == fleet.n_recordings == n
        assert len(fleet.sql("SHOW TABLES")) >= len(TABLES)
    assert read[:2] == [(n, {"exits", "vcpus"}), (n, set())]
    assert read[2] == (len(rules), {"rules"})
    assert len(rules) < n


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("report", "{tmp}"), 3, "summaries made by"),
        (("report", "{dest}", "--by", "colour"), 2, "no such column"),
        (("report", "{dest}", "--where", "selekt"), 2, "selekt"),
        (("report", "{dest}", "--where", "host = 'nobody'"), 2, "no recording for which"),
        (("sql", "{dest}", "DROP nonsense"), 2, "nonsense"),
        (("sql", "{dest}", "COPY rules TO '{tmp}/x'"), 2, "disabled"),
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


def test_workers_that_nobody_restarts_are_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from distributed.nanny import Nanny

    ends, restart = [], Nanny._on_worker_exit_sync

    def once_for_each(nanny: Nanny, exitcode: int) -> None:
        ends.append(exitcode)
        if len(ends) > 2:
            restart(nanny, exitcode)

    monkeypatch.setattr(Nanny, "_on_worker_exit_sync", once_for_each)
    monkeypatch.setattr("kvmtrace.fleet.executors.REPLACE_S", 3)
    results: dict[str, object] = {}
    task = partial(die_or_tell, folder=str(tmp_path))
    run_tasks(Engine("dask", workers=2), task, ["bad", "a", "b"], results.__setitem__)
    assert isinstance(results.pop("bad"), Failed)
    assert results == {"a": "A", "b": "B"}
    assert len(ends) > 2


def take_much(argument: str, *, folder: str) -> str:
    """Take more memory than the workers may have, the first time; a marker says that it was tried."""
    marker = Path(folder, argument)
    if argument == "greedy" and not marker.exists():
        marker.touch()
        held = [bytearray(os.urandom(1 << 20)) for _ in range(700)]  # noqa: F841
        time.sleep(60)  # until the nanny looks
    return argument


def test_a_worker_out_of_memory_changes_nothing(tmp_path: Path) -> None:
    results: dict[str, object] = {}
    engine = Engine("dask", workers=2, memory_limit="400MiB")
    run_tasks(engine, partial(take_much, folder=str(tmp_path)), ["a", "greedy", "b", "c"], results.__setitem__)
    assert (tmp_path / "greedy").exists()
    assert results == {name: name for name in ("a", "greedy", "b", "c")}


def test_a_cluster_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmtrace.fleet.executors.WORKERLESS_S", 1)
    with dask_scheduler() as (address, _), pytest.raises(CapabilityError, match=r"no worker is left.*run the same"):
        run_tasks(Engine("dask", scheduler=address), str, ["x"], lambda *_: None)


@contextmanager
def dask_scheduler() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a scheduler in a process of its own; give its address."""
    command = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as scheduler:
        assert scheduler.stderr is not None
        try:
            address = next(found[0] for line in scheduler.stderr if (found := re.search(r"tcp://[\d.]+:\d+", line)))
            threading.Thread(target=scheduler.stderr.read, daemon=True).start()  # it must not wait for its reader
            yield address, scheduler
        finally:
            scheduler.kill()


def test_what_waits_for_a_lost_scheduler_in_the_background_is_silent() -> None:
    lines = (
        "from kvmtrace.fleet.executors import silence_dask",
        "from tornado.log import app_log",
        "silence_dask()",
        "app_log.error('lost')",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_scheduler_lost_in_mid_run_is_one_line_and_a_rerun_goes_on(dest: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in SOURCES:
        shutil.copy(source, sources)
    os.mkfifo(sources / "z-never-written")  # whoever summarises it waits: the run cannot be over before the kill
    out = str(tmp_path / "dest")
    with dask_scheduler() as (address, scheduler):
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
        command = [sys.executable, "-m", "kvmtrace", "fleet", "summarize", str(sources / "*"), "-o", out]
        with (
            subprocess.Popen([*worker, "--no-nanny"], stderr=subprocess.DEVNULL) as serving,
            subprocess.Popen(
                [*command, "--engine", "dask", "--scheduler", address], stderr=subprocess.PIPE, text=True
            ) as asking,
        ):
            deadline = time.monotonic() + 120
            while len(Store(out).objects("summaries")) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            scheduler.kill()
            _, errors = asking.communicate(timeout=300)
            serving.kill()
    assert asking.returncode == 4, errors
    assert len(errors.splitlines()) == 1, errors
    assert "is gone" in errors
    assert "run the same command again" in errors
    (sources / "z-never-written").unlink()
    again = kvmtrace("fleet", "summarize", str(sources / "*"), "-o", out)
    assert again.returncode == 0, again.stderr
    made, here = rows_of(Path(out)), rows_of(dest)
    assert made.keys() == here.keys()


@pytest.mark.parametrize("engine", ["local", "dask"])
def test_ctrl_c_leaves_what_is_done_and_a_rerun_goes_on(engine: str, dest: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in SOURCES[:3]:
        shutil.copy(source, sources)
    os.mkfifo(sources / "z-never-written")  # whoever summarises it waits: the run is not over before Ctrl-C
    out = str(tmp_path / "dest")
    command = ["fleet", "summarize", str(sources / "*"), "-o", out, "--engine", engine, "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "kvmtrace", *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        deadline = time.monotonic() + 120
        while len(Store(out).objects("summaries")) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
        _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors.strip()) == (130, "kvmtrace: interrupted")
    assert not still_there(running.pid)
    assert Store(out).objects("failures") == []
    (sources / "z-never-written").unlink()
    shutil.copy(SOURCES[3], sources)
    again = kvmtrace(*command[:-4], "--workers", "1")  # whatever the engine
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("1 summary made")
    assert "3 there already" in again.stdout
    made, here = rows_of(Path(out)), rows_of(dest)
    assert {name: rows[0]["exits"] for name, rows in made.items()} == {name: here[name][0]["exits"] for name in made}


def still_there(group: int) -> bool:
    """Say whether a process of a group is left after a while."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def test_what_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A slow or stumbling object store: the source is tried again; if it goes on, it is a row with its attempts."""
    tried: list[str] = []

    @contextmanager
    def stumbling(source: str) -> Iterator[Path]:
        tried.append(source)
        if len(tried) < 3 or source == "always":
            raise OSError(errno.EIO, "SlowDown: reduce your request rate")
        yield Path(SOURCES[0])

    monkeypatch.setattr("kvmtrace.fleet.summarizing.at_hand", stumbling)
    outcome = summarize_source("twice", dest=str(tmp_path), job=1.0)
    assert (outcome.status, tried) == ("made", ["twice"] * 3)
    lost = summarize_source("always", dest=str(tmp_path), job=1.0)
    assert (lost.status, lost.attempts, lost.kind) == ("failed", 3, "OSError")


def test_summaries_of_the_recorder_stand_beside_recordings(tmp_path: Path) -> None:
    """What `record --summary` wrote: counts, times and identity; what it did not count is null."""
    sources = [str(tmp_path / "live.json"), SOURCES[0]]
    Path(sources[0]).write_bytes(live_summary())
    progress = summarize_all(Engine(workers=1), sources, str(tmp_path / "dest"))
    assert progress.counts == {"made": 2}
    (row,) = [rows[0] for rows in rows_of(tmp_path / "dest").values() if rows[0]["format"] == "kvmtrace-summary"]
    assert (row["host"], row["kernel"], row["isa"], row["day"], row["n_events"]) == ("h", "6.1", "vmx", "2026-01-01", 9)
    assert row["loss"]["events"] == 3
    (cell,) = row["exits"]
    assert (cell["name"], cell["count"], cell["samples"], cell["total_ns"], cell["max_ns"]) == ("CPUID", 2, 2, 9, 5)
    assert (cell["min_ns"], cell["squares_ns2"], cell["buckets"]) == (None, None, [])
    assert [(r["name"], r["errno"], r["count"]) for r in row["userspace_exits"]] == [
        ("-EINTR", -4, 2),
        ("KVM_EXIT_IO", 0, 2),
    ]
    (vcpu,) = row["vcpus"]
    assert (vcpu["guest_ns"], vcpu["handler_ns"], vcpu["halt_poll_ns"], vcpu["wall_ns"]) == (10, 10, None, 60)
    dest = str(tmp_path / "dest")
    for form in ("text", "json", "html"):
        done = kvmtrace("fleet", "report", dest, "--format", form, "--by", "host,kernel")
        assert done.returncode == 0, done.stderr
    compared = kvmtrace("fleet", "compare", dest, "--base", "host = 'h'", "--new", "host <> 'h'")
    assert compared.returncode == 0, compared.stderr


class Piece(Recording):
    """Some of a recording's events, as a recording."""

    def __init__(self, whole: Recording, start: int, stop: int) -> None:
        self.kinds, self.capture, self.comms, self.processes = whole.kinds, whole.capture, whole.comms, whole.processes
        self.loss = whole.loss
        self._events = whole.events().slice(start, stop)

    def events(self) -> EventTable:
        return self._events

    def iter_events(self, max_events: int = 0) -> Iterator[EventTable]:
        yield self._events


def cuts(events: EventTable, n: int) -> list[int]:
    """Return where to cut: the guest runs there, so that no VM-exit is parted from the entry behind it."""
    inside = events.rows("kvm_entry") + 1
    return [0, *(int(inside[len(inside) * i // n]) for i in range(1, n)), len(events)]


@pytest.mark.parametrize("name", ["vmx-6.1-lifecycle", "svm-6.1-string-io", "svm-6.12-storm"])
def test_seven_pieces_add_up_to_the_whole(name: str, tmp_path: Path) -> None:
    whole = open_recording(FIXTURES / f"{name}.dat")
    places = cuts(whole.events(), 7)
    for i, (start, stop) in enumerate(pairwise(places)):
        with (tmp_path / f"{i}.parquet").open("wb") as out:
            write_parquet(Piece(whole, start, stop), out)
    numbers = []
    for label, sources in (
        ("whole", [str(FIXTURES / f"{name}.dat")]),
        ("pieces", sorted(map(str, tmp_path.glob("*.parquet")))),
    ):
        assert summarize_all(Engine(workers=1), sources, str(tmp_path / label)).counts == {"made": len(sources)}
        with Fleet(str(tmp_path / label)) as fleet:
            assert fleet.n_recordings == len(sources)
            numbers.append([fleet.arrow(query).to_pylist() for query in (SUMS, HISTOGRAMS)])
    assert numbers[0] == numbers[1]
    assert sum(row["count"] for row in numbers[0][0]) == whole.events().count("kvm_exit")
