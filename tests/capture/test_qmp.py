"""The recorder reads from a QMP socket, and never changes anything in QEMU."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING

from kvmtrace.capture.qmp import QUESTIONS, ask

if TYPE_CHECKING:
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
