"""What a running QEMU says of itself over QMP: its accelerator, its vCPUs' threads, its types. Only questions.

Source: QEMU Machine Protocol specification; qapi/machine.json (query-cpus-fast, query-kvm), qapi/qom.json
(qom-list-types).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# name in the metadata -> the question; every one of them only reads
QUESTIONS: dict[str, dict[str, Any]] = {
    "version": {"execute": "query-version"},
    "kvm": {"execute": "query-kvm"},
    "cpus": {"execute": "query-cpus-fast"},
    "accel_types": {"execute": "qom-list-types", "arguments": {"implements": "accel", "abstract": True}},
    "cpu_types": {"execute": "qom-list-types", "arguments": {"implements": "x86_64-cpu", "abstract": True}},
}
MAX_ANSWER_BYTES = 4 << 20
POLL_S = 0.05
KEPT_TYPES = 400


def ask(path: str | Path, timeout_s: float = 5.0) -> dict[str, Any]:
    """Ask all questions once.

    Parameters
    ----------
    path : of QEMU's QMP socket (`-qmp unix:PATH,server=on,wait=off`)

    Returns
    -------
    question -> answer, or {"error": text} for those that failed

    Raises
    ------
    OSError
        Nobody listens there.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        with connection.makefile("rwb") as stream:
            _line(stream)  # the greeting
            _exchange(stream, {"execute": "qmp_capabilities"})
            return {name: _exchange(stream, question) for name, question in QUESTIONS.items()}


def _line(stream: Any) -> dict[str, Any]:
    line = stream.readline(MAX_ANSWER_BYTES)
    answer = json.loads(line) if line else {"error": {"desc": "QEMU closed the socket"}}
    return answer if isinstance(answer, dict) else {"error": {"desc": "not QMP"}}


def _exchange(stream: Any, command: dict[str, Any]) -> Any:
    stream.write(json.dumps(command).encode() + b"\n")
    stream.flush()
    while True:
        answer = _line(stream)
        if "return" in answer:
            found = answer["return"]
            return found[:KEPT_TYPES] if isinstance(found, list) else found
        if "error" in answer:
            return {"error": str(answer["error"].get("desc", "")) if isinstance(answer["error"], dict) else "?"}
        # anything else is an event: not asked for


class QmpWitness:
    """Asks in the background as soon as the socket is there and every vCPU has its thread.

    Parameters
    ----------
    path : of the socket, or None to ask nobody
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._answer: dict[str, Any] | None = None
        self._problem = "nobody listened before the recording ended"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if path else None

    def start(self) -> None:
        """Begin to try."""
        if self._thread:
            self._thread.start()

    def _run(self) -> None:
        assert self._path is not None
        while not self._stop.is_set():
            try:
                answer = ask(self._path)
            except (OSError, ValueError) as error:
                self._problem = str(error)
            else:
                self._answer = answer
                cpus = answer.get("cpus")
                if isinstance(cpus, list) and all(isinstance(c, dict) and c.get("thread-id") for c in cpus):
                    return
            time.sleep(POLL_S)

    def finish(self) -> dict[str, Any] | None:
        """Return what was learnt; None if nobody was asked."""
        if self._thread is None:
            return None
        self._stop.set()
        with contextlib.suppress(RuntimeError):
            self._thread.join(timeout=1)
        return self._answer if self._answer is not None else {"error": f"{self._path}: {self._problem}"}
