"""Every format text that the kernels have had: parsed, decoded and exported; nothing but bytes ends in an error."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import numpy as np
import pytest
from writers.formats import event_format
from writers.in_memory import InMemory
from writers.kernel_formats import kernel_formats
from writers.ring_buffer import event, page, record
from writers.trace_dat import TraceDatWriter

from kvmtrace.formats.arrow import arrow_writing
from kvmtrace.formats.known_formats import open_recording, recognise
from kvmtrace.formats.trace_dat.trace_dat_layout import read_trace_dat
from kvmtrace.table.format_text import DATA_LOC, REL_LOC, parse_event_format

FIXTURES = Path(__file__).parents[2] / "fixtures"


def body(fields, rng: random.Random) -> bytes:
    """Return a record's fields (from byte 8 on): numbers count up, texts say their field's name, places are right."""
    end = max(offset + size for _, offset, size, _ in fields)
    out = bytearray(rng.randbytes(end + -end % 4 + 16))
    tail = len(out) - 16
    out[tail:] = b"tail text\0".ljust(16, b"\0")
    for declared, offset, size, _ in fields:
        if declared.startswith("__data_loc"):
            out[offset : offset + 4] = (tail | 10 << 16).to_bytes(4, "little")
        elif declared.startswith("__rel_loc"):
            out[offset : offset + 4] = (tail - offset - 4 | 10 << 16).to_bytes(4, "little")
        elif declared.startswith("char ") and size:
            out[offset : offset + size] = b"comm".ljust(size, b"\0")
        elif not size:
            out[offset : offset + 10] = b"tail text\0"
    return bytes(out[8:])


def recorded(rows) -> bytes:
    rng = random.Random(1)
    records = [record(event(number, body(fields, rng), tid=7), 7) for _, number, fields, _ in rows]
    pages = [page(1000 * i, records[i : i + 8]) for i in range(0, len(records), 8)]
    return TraceDatWriter([b"".join(pages)], formats={"kvm": [text for *_, text in rows]}).v6()


@pytest.fixture(scope="module")
def rows():
    return kernel_formats()


@pytest.fixture(scope="module")
def data(rows):
    return recorded(rows)


def test_every_field_is_read(rows, data):
    events = recognise(InMemory(data)).events()
    assert len(events) == len(rows)
    for kind in events.kinds:
        for name, dtype in kind.fields.items() if events.count(kind.name) else ():
            values = events.field(kind.name, name)
            assert len(values) == 1, (kind.name, name)
            assert values.dtype.kind == dtype.base.kind, (kind.name, name)


def test_no_field_is_lost(rows):
    for title, _, fields, text in rows:
        parsed = parse_event_format(text.decode(), "kvm")
        assert len(parsed.fields) == len(fields), title
        assert [f.offset for f in parsed.fields.values()] == [offset for _, offset, _, _ in fields], title


def test_texts_in_all_their_places(data):
    events = recognise(InMemory(data)).events()
    found = {}
    for kind in events.kinds:
        for name, dtype in kind.fields.items():
            if dtype.kind == "S" and not dtype.itemsize and events.count(kind.name):
                found[kind.name.partition("#")[0].removeprefix("kvm:"), name] = events.field(kind.name, name)[0]
    assert found["print", "buf"] == found["sched_process_exec", "filename"] == found["relative", "text"] == b"tail text"


@pytest.mark.parametrize("write", ["parquet", "arrow", "csv"])
def test_every_event_is_exported(data, write, tmp_path):
    path = tmp_path / f"file.{write}"
    with path.open("wb") as out:
        getattr(arrow_writing, f"write_{write}")(recognise(InMemory(data)), out)
    if write == "csv":
        rows = list(csv.reader(io.StringIO(path.read_text())))
        assert len({len(row) for row in rows}) == 1
        assert any("tail text" in cell for row in rows for cell in row)
        return
    again, events = open_recording(path, any_architecture=True).events(), recognise(InMemory(data)).events()
    for kind in events.kinds:
        for name in kind.fields if events.count(kind.name) else ():
            assert np.array_equal(again.field(kind.name, name), events.field(kind.name, name)), (kind.name, name)


def fixture_formats() -> dict[str, list[bytes]]:
    """Return the format texts of 6.1 and 6.12 that the fixtures carry, each once."""
    found: dict[tuple[str, str, tuple], bytes] = {}
    for path in FIXTURES.glob("*.dat"):
        for fmt in read_trace_dat(memoryview(path.read_bytes()), path.name).formats:
            fields = [(f"{f.type_text} {n}", f.offset, f.size, int(f.dtype.kind == "i")) for n, f in fmt.fields.items()]
            fields = [
                (f"__data_loc {d}" if f.place == DATA_LOC else f"__rel_loc {d}" if f.place == REL_LOC else d, *rest)
                for (d, *rest), f in zip(fields, fmt.fields.values(), strict=True)
            ]
            key = fmt.system, fmt.name, tuple(fields)
            found.setdefault(key, event_format(fmt.name, 3000 + len(found), fields))
    out: dict[str, list[bytes]] = {}
    for (system, _, _), text in found.items():
        out.setdefault(system, []).append(text)
    return out


def test_the_formats_of_the_fixtures_are_exported():
    rng = random.Random(2)
    formats = fixture_formats()
    records = []
    for system, texts in formats.items():
        for text in texts:
            parsed = parse_event_format(text.decode(), system)
            size = max((f.offset + f.size for f in parsed.fields.values()), default=8)
            records.append(record(event(parsed.event_id, rng.randbytes(min(size + -size % 4, 100)), tid=7), 7))
    pages = [page(1000 * i, records[i : i + 8]) for i in range(0, len(records), 8)]
    data = TraceDatWriter([b"".join(pages)], formats=formats).v6()
    assert len(records) > 80
    for write in (arrow_writing.write_parquet, arrow_writing.write_arrow, arrow_writing.write_csv):
        out = io.BytesIO()
        write(recognise(InMemory(data)), out)
        assert out.getvalue()
