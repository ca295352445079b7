"""The recorder reads from a QMP socket, and never changes anything in QEMU."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture.qmp import KEPT_ITEMS, MAX_ANSWER_BYTES, QUESTIONS, QmpWitness, ask, bounded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HARMLESS = {"qmp_capabilities"}  # the greeting, without which QEMU answers nothing


def serve(listener: socket.socket, asked: list[str]) -> None:
    connection = listener.accept()[0]
    with connection, connection.makefile("rwb") as stream:
        stream.write(b'{"QMP": {}}\n')
        stream.flush()
        for line in stream:
            asked.append(json.loads(line)["execute"])
            stream.write(b'{"event": "RESUME"}\n{"return": []}\n')
            stream.flush()


def test_only_questions_are_asked(tmp_path: Path) -> None:
    path, asked = tmp_path / "qmp", []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=serve, args=(listener, asked))
        server.start()
        assert set(ask(path)) == set(QUESTIONS)
        server.join(10)
    assert len(asked) == 1 + len(QUESTIONS)
    assert all(command.startswith("query-") or command == "qom-list-types" for command in set(asked) - HARMLESS)


def drown(listener: socket.socket, parts: Iterator[bytes]) -> None:
    connection = listener.accept()[0]
    with connection, connection.makefile("rwb") as stream, contextlib.suppress(OSError):
        for part in parts:
            stream.write(part)
            stream.flush()


@pytest.mark.parametrize(
    ("greeting", "answer"),
    [
        (b'{"QMP": {}}\n', b"[" * 900_000 + b"\n"),
        (b'{"QMP": {}}\n', b'{"return": ' + b'{"a":' * 150_000 + b"1" + b"}" * 150_000 + b"}\n"),
        (b'{"QMP": {}}\n', b" " * (MAX_ANSWER_BYTES + 10)),
        (b'{"QMP": {}}\n', b'{"event": "RESUME"}\n' * 2000),
        (b"x" * (2 * MAX_ANSWER_BYTES), b""),
        (b"\xff\xfe\n", b""),
    ],
    ids=["deep list", "deep object", "long line", "events", "no greeting", "no text"],
)
def test_hostile_servers_are_told_in_a_line(greeting: bytes, answer: bytes, tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=drown, args=(listener, iter([greeting, answer])))
        server.start()
        with pytest.raises((ValueError, OSError)):
            ask(path, timeout_s=5)
        server.join(10)


def test_answers_are_kept_in_bounds() -> None:
    deep: object = 1
    for _ in range(50):
        deep = {"a": deep}
    assert len(json.dumps(bounded(deep))) < 100
    assert len(bounded(list(range(10_000)))) == KEPT_ITEMS
    assert len(bounded({str(i): i for i in range(10_000)})) == KEPT_ITEMS
    assert len(bounded("x" * 10_000)) == 200
    assert bounded({"qom-path": "/machine", "thread-id": 7, "target": None}) == {
        "qom-path": "/machine",
        "thread-id": 7,
        "target": None,
    }


def test_nobody_listened(tmp_path: Path) -> None:
    witness = QmpWitness(tmp_path / "none")
    witness.start()
    assert "error" in (witness.finish() or {})
    assert str(tmp_path / "none") in (witness.problem() or "")
    assert QmpWitness(None).problem() is None
