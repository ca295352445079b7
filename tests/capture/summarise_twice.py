"""One run of a bundled guest in two summaries at once: by raw and BTF tracepoints, and by plain ones.

    python summarise_twice.py OUT GUEST [ARGUMENT...]

writes OUT/raw.json and OUT/plain.json: how the programs hang, and the rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvmtrace.capture.bpf.summary_maps import SummaryPrograms
from tests.capture.record_twice import WAIT_S, start_guest


def summarise_twice(folder: Path, guest: str, arguments: list[str]) -> None:
    process, go = start_guest(guest, arguments)
    tids = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
    both = {"raw": SummaryPrograms(process.pid), "plain": SummaryPrograms(process.pid, raw=False)}
    for programs in both.values():
        programs.attach(tids)
    os.write(go, b"G")
    os.close(go)
    assert process.wait(WAIT_S) == 0
    now = time.monotonic_ns()
    for name, programs in both.items():
        text = json.dumps({"attached": programs.attached.by_mechanism(), "rows": programs.snapshot(now)})
        (folder / f"{name}.json").write_text(text)
        programs.close()


if __name__ == "__main__":
    summarise_twice(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
