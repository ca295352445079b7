"""`kvmtrace export` of VM-exits and userspace exits, read back by pandas; anonymised; cells of CSV; odd formats."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kvmtrace
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.formats.arrow.arrow_writing import write_arrow, write_csv, write_parquet
from kvmtrace.report.anonymized_recording import AnonymizedRecording
from kvmtrace.spans.row_streams import OrderedRows
from kvmtrace.table.event_table import COMMON_DTYPES, EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload
from kvmtrace.table.recording import Capture, Loss, Recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
SMALL = FIXTURES / "svm-6.12-interrupt.dat"
MANY = FIXTURES / "svm-6.12-lifecycle.dat"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmtrace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("table", ["vm_exits", "userspace_exits"])
def test_tables_are_the_frames(tmp_path: Path, table: str) -> None:
    expected = getattr(kvmtrace.load(MANY), table).drop(columns="pid", errors="ignore")
    for suffix, read in (("parquet", pd.read_parquet), ("arrow", pd.read_feather), ("csv", pd.read_csv)):
        out = tmp_path / f"x.{suffix}"
        done = run("export", MANY, "-o", out, "--table", table)
        assert done.returncode == 0, done.stderr
        found = read(out)
        assert list(found.columns) == list(expected.columns)
        assert len(found) == len(expected) > 10
        for name in expected.columns:
            mine = expected[name].astype(object).where(expected[name].notna(), None).tolist()
            its = found[name].astype(object).where(found[name].notna(), None).tolist()
            assert its == mine, name
        if suffix != "csv":
            assert found["row"].is_monotonic_increasing
            numbers = [name for name in found.columns if pd.api.types.is_numeric_dtype(expected[name].dtype)]
            assert [str(found[name].dtype) for name in numbers] == [str(expected[name].dtype) for name in numbers]


def test_integers_of_events_stay_integers_in_pandas(tmp_path: Path) -> None:
    assert run("export", SMALL, "-o", tmp_path / "x.parquet").returncode == 0
    frame = pd.read_parquet(tmp_path / "x.parquet", columns=["kvm_exit.guest_rip", "kvm_entry.rip", "ts_ns"])
    assert [str(dtype) for dtype in frame.dtypes] == ["UInt64", "UInt64", "int64"]


def test_a_timeline_has_no_tables(tmp_path: Path) -> None:
    done = run("export", SMALL, "-o", tmp_path / "x.pftrace", "--table", "vm_exits")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["svm-6.12-interrupt.dat", "vmx-6.1-mmio-split.dat", "svm-6.1-string-io.dat"])
def test_anonymised_recordings_get_the_same_verdict(name: str) -> None:
    plain = check_recording(open_recording(FIXTURES / name))
    hidden = check_recording(AnonymizedRecording(open_recording(FIXTURES / name)))
    assert {rule: vars(result) for rule, result in hidden.rules.items()} == {
        rule: vars(result) for rule, result in plain.rules.items()
    }


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv", "perfetto.json", "pftrace"])
def test_anonymised_exports_name_nobody(tmp_path: Path, suffix: str) -> None:
    source = open_recording(SMALL)
    secrets = {*source.comms.values(), source.capture.host, source.capture.cpu_model, str(SMALL)} - {None, "<idle>"}
    assert len(secrets) > 3
    out = tmp_path / f"x.{suffix}"
    assert run("export", SMALL, "-o", out, "--anonymize").returncode == 0
    if suffix in ("parquet", "arrow"):  # compressed: its cells
        table = pq.read_table(out) if suffix == "parquet" else pa.ipc.open_file(out).read_all()
        texts = [c.to_pylist() for c in table.columns if pa.types.is_string(c.type)]
        data = repr(texts) + repr(table.schema.metadata)
    else:
        data = out.read_bytes().decode("utf-8", "replace")
    found = [secret for secret in secrets if len(str(secret)) > 4 and str(secret) in data]
    assert not found


class OneTable(Recording):
    def __init__(self, table: EventTable) -> None:
        self.capture, self.loss, self.kinds = Capture("x.dat", "trace.dat"), Loss(), table.kinds
        self.comms, self.processes, self._table = {}, {}, table

    def events(self) -> EventTable:
        return self._table

    def iter_events(self, max_events: int = 4_000_000):
        yield self._table


def events(kind: EventKind, columns: dict[str, np.ndarray]) -> OneTable:
    n = len(next(iter(columns.values())))
    common = {name: np.zeros(n, dtype) for name, dtype in COMMON_DTYPES.items()}
    return OneTable(EventTable(common, (kind,), {0: ColumnPayload(columns)}))


NAMES = [b"=1+1", b"+x", b"-y", b"@z", b"\tq", b"plain", b"a=b"]


def test_cells_that_a_spreadsheet_would_compute_are_text() -> None:
    kind = EventKind("task_rename", "task", {"newcomm": np.dtype("S16"), "pid": np.dtype("i4")})
    out = io.BytesIO()
    write_csv(events(kind, {"newcomm": np.array(NAMES, "S16"), "pid": np.arange(-3, 4, dtype="i4")}), out)
    rows = list(csv.DictReader(io.StringIO(out.getvalue().decode())))
    assert [row["task_rename.newcomm"] for row in rows] == ["'=1+1", "'+x", "'-y", "'@z", "'\tq", "plain", "a=b"]
    assert [row["task_rename.pid"] for row in rows] == ["-3", "-2", "-1", "0", "1", "2", "3"]


def test_fields_of_size_0_are_exported(tmp_path: Path) -> None:
    empty = np.dtype((np.uint8, (0,)))
    kind = EventKind("print", "ftrace", {"ip": np.dtype("u8"), "buf": empty})
    source = events(kind, {"ip": np.arange(3, dtype="u8"), "buf": np.zeros((3, 0), np.uint8)})
    for name, write in (("x.parquet", write_parquet), ("x.arrow", write_arrow), ("x.csv", write_csv)):
        with (tmp_path / name).open("wb") as out:
            write(source, out)
    for name in ("x.parquet", "x.arrow"):
        back = open_recording(tmp_path / name).events()
        assert back.field("print", "ip").tolist() == [0, 1, 2]
        assert back.field("print", "buf").shape == (3, 0)


def test_late_rows_come_back_in_order() -> None:
    dtype = np.dtype([("row", np.int64), ("x", np.int8)])
    rng = np.random.default_rng(2)
    order = np.arange(1000)
    late = rng.choice(order, 40, replace=False)
    taken = OrderedRows(dtype)
    for start in range(0, 1000, 100):
        piece = [row for row in order[start : start + 100] if row not in late]
        piece += [row for row in late if start <= row + 300 < start + 100]
        rows = np.zeros(len(piece), dtype)
        rows["row"] = np.sort(piece)
        taken.add(rows)
    rest = np.zeros(sum(late + 300 >= 1000), dtype)
    rest["row"] = np.sort(late[late + 300 >= 1000])
    taken.add(rest)
    assert np.concatenate(list(taken))["row"].tolist() == order.tolist()


def test_what_did_not_go_to_the_vmm_has_no_errno_and_no_category() -> None:
    exits = kvmtrace.load(Path(__file__).parents[2] / "fixtures" / "svm-6.12-linux-2vcpu.dat").vm_exits
    assert (exits.errno.isna() == ~exits.to_userspace).all()
    assert exits.userspace_exit.value_counts().min() > 0
