"""What a running QEMU says of itself over QMP: its accelerator, its vCPUs' threads, its types. Only questions.

Source: QEMU Machine Protocol specification; qapi/machine.json (query-cpus-fast, query-kvm, query-uuid), qapi/control
(query-name, query-version), qapi/qom.json (qom-list-types).
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
    "name": {"execute": "query-name"},
    "uuid": {"execute": "query-uuid"},
    "kvm": {"execute": "query-kvm"},
    "cpus": {"execute": "query-cpus-fast"},
    "accel_types": {"execute": "qom-list-types", "arguments": {"implements": "accel", "abstract": True}},
    "cpu_types": {"execute": "qom-list-types", "arguments": {"implements": "x86_64-cpu", "abstract": True}},
}
MAX_ANSWER_BYTES = 1 << 20  # QEMU's largest here, its CPU types, takes 60 KB
MAX_EVENTS = 1000  # sent while we wait for an answer
MAX_DEPTH = 8
MAX_TEXT = 200
POLL_S = 0.05
KEPT_ITEMS = 400  # of a list: CPU types


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
    ValueError
        What answers is not QEMU.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        with connection.makefile("rwb") as stream:
            return converse(stream, time.monotonic() + timeout_s)


def converse(stream: Any, until: float) -> dict[str, Any]:
    """Ask all questions of whoever is at the other end of a binary stream, until a time of the monotonic clock.

    Returns and raises as `ask` does.
    """
    _line(stream, until)  # the greeting
    _exchange(stream, {"execute": "qmp_capabilities"}, until)
    return {name: _exchange(stream, question, until) for name, question in QUESTIONS.items()}


def _line(stream: Any, until: float) -> dict[str, Any]:
    """Return the next object that was sent.

    Raises
    ------
    ValueError
        It is not QMP, or more than QEMU would say.
    """
    if time.monotonic() > until:
        raise ValueError("it took too long to answer")
    line = stream.readline(MAX_ANSWER_BYTES + 1)
    if not line:
        return {"error": {"desc": "QEMU closed the socket"}}
    if len(line) > MAX_ANSWER_BYTES:
        raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    try:
        answer = json.loads(line)
    except RecursionError:
        raise ValueError("an answer that is nested too deeply") from None
    return answer if isinstance(answer, dict) else {"error": {"desc": "not QMP"}}


def _exchange(stream: Any, command: dict[str, Any], until: float) -> Any:
    stream.write(json.dumps(command).encode() + b"\n")
    stream.flush()
    for _ in range(MAX_EVENTS):
        answer = _line(stream, until)
        if "return" in answer:
            return bounded(answer["return"])
        if "error" in answer:
            described = answer["error"].get("desc", "") if isinstance(answer["error"], dict) else "?"
            return {"error": str(described)[:MAX_TEXT]}
        # anything else is an event: not asked for
    raise ValueError(f"more than {MAX_EVENTS} events and no answer")


def bounded(value: Any, depth: int = 0) -> Any:
    """Return what of an answer is kept: it goes into the recording's metadata."""
    if isinstance(value, (list, dict)) and depth >= MAX_DEPTH:
        return None
    if isinstance(value, list):
        return [bounded(item, depth + 1) for item in value[:KEPT_ITEMS]]
    if isinstance(value, dict):
        return {str(key)[:MAX_TEXT]: bounded(item, depth + 1) for key, item in list(value.items())[:KEPT_ITEMS]}
    return value[:MAX_TEXT] if isinstance(value, str) else value


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
                self._problem = str(error)[:MAX_TEXT]
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

    def problem(self) -> str | None:
        """Say why nothing was learnt; None if something was, or nobody was asked."""
        return None if self._thread is None or self._answer is not None else f"--qmp {self._path}: {self._problem}"
