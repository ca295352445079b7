"""What `trace-cmd report -R -t` prints of a trace.dat, as columns."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LINE = re.compile(r"^\s*(.*)-(-?\d+)\s+\[(\d+)\]\s+(?:\S{4,6}\s+)?(\d+)\.(\d{9}): (\S+):\s*(.*)$")
_FIELD = re.compile(r"(\w+)=(\S+)")


def report(path: Path) -> list[tuple[int, int, int, str, dict[str, str]]]:
    """Return (ts_ns, cpu, tid, event, fields as text) of each event trace-cmd prints."""
    # about one run in some hundred, on a loaded machine, ends with status 0 and not one line: then it is asked again
    for _ in range(3):
        done = subprocess.run(["trace-cmd", "report", "-R", "-t", "-i", str(path)], capture_output=True, check=True)
        if done.stdout.count(b"\n") > 1:
            break
    out = []
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        match = _LINE.match(line)
        if match:
            _, tid, cpu, seconds, fraction, name, body = match.groups()
            out.append((int(seconds) * 10**9 + int(fraction), int(cpu), int(tid), name, dict(_FIELD.findall(body))))
    return out
