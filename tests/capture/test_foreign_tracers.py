"""Others trace while we record, are killed and finish after ourselves: their settings, events and programs stay."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.capture.ftrace.instance import Instance
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.formats import open_recording
from tests.capture.bpf_held import forgotten_programs
from tests.capture.record_twice import bpf_runs, ftrace_runs, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm
KVMTRACE = [sys.executable, "-m", "kvmtrace"]
SETTINGS = (
    "tracing_on",
    "trace_clock",
    "set_event",
    "set_event_pid",
    "buffer_size_kb",
    "current_tracer",
    "events/kvm/kvm_cpuid/filter",
    "events/enable",
    "options/record-tgid",
    "options/event-fork",
)
LIFECYCLE_USERSPACE_EXITS = 102


def settings(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in SETTINGS if (folder / name).exists()}


def everything(tracefs: Path) -> dict[str, Any]:
    """Return what tracing there is on this machine, but the events."""
    probes = {
        name: (tracefs / name).read_text()
        for name in ("kprobe_events", "uprobe_events", "dynamic_events")
        if (tracefs / name).exists()
    }
    others = [path for path in (tracefs / "instances").iterdir() if not path.name.startswith("kvmtrace-")]
    return {"top": settings(tracefs), "probes": probes, "instances": {path.name: settings(path) for path in others}}


def left_by(tracefs: Path, pid: int) -> list[str]:
    """Return what a recorder left in the kernel."""
    return [*(path.name for path in (tracefs / "instances").glob(f"kvmtrace-{pid}-*")), *map(str, forgotten_programs())]


class Others:
    """An instance with a filter, and a bpftrace program, on events that we record too."""

    def __init__(self, tracefs: Path) -> None:
        self.instance = Instance(tracefs, f"foreign-{os.getpid()}")
        self.instance.create()
        self.instance.set_buffer(4 << 20)
        self.instance.write("trace_clock", "boot")
        self.instance.write("events/kvm/kvm_cpuid/filter", "function != 0x7fffffff")
        self.instance.write("events/kvm/kvm_userspace_exit/enable", "1")
        self.instance.write("tracing_on", "1")
        self.bpftrace = subprocess.Popen(
            ["bpftrace", "-e", "tracepoint:kvm:kvm_userspace_exit { @n = count(); }"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.bpftrace.stdout is not None
        assert self.bpftrace.stdout.readline().startswith("Attaching 1 probe")
        wait_until(self._attached, self.bpftrace)  # which comes after the line

    def _attached(self) -> bool:
        links = [os.readlink(path) for path in Path(f"/proc/{self.bpftrace.pid}/fd").iterdir()]
        return any("perf_event" in link or "bpf_link" in link for link in links)

    def seen(self) -> tuple[int, int]:
        """Return how many userspace exits the instance and bpftrace saw."""
        self.bpftrace.send_signal(signal.SIGINT)
        text = self.bpftrace.communicate(timeout=300)[0]
        match = re.search(r"@n: (\d+)", text)
        assert match is not None, text
        return self.instance.read("trace").count("kvm_userspace_exit:"), int(match[1])

    def close(self) -> None:
        self.bpftrace.kill()
        self.bpftrace.wait()
        self.instance.remove()


@pytest.fixture
def others() -> Iterator[Others]:
    found = Others(find_tracefs())
    yield found
    found.close()


def recorder(backend: str, output: Path, *target: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*KVMTRACE, "record", "--backend", backend, "-o", str(output), *target], stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
def test_others_keep_their_settings_and_see_their_events(others: Others, tmp_path: Path, backend: str) -> None:
    tracefs = find_tracefs()
    before = everything(tracefs)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert recorder(backend, whole, "--guest", "lifecycle").wait(300) == 0
    ours = open_recording(whole).events().count("kvm_userspace_exit")

    with recorder(backend, killed, "--guest", "storm", "--count", "100000000") as victim:
        wait_until(lambda: bpf_runs(killed) if backend == "bpf" else ftrace_runs(victim.pid), victim)
        time.sleep(0.2)
        victim.kill()
    assert recorder(backend, tmp_path / "next", "--guest", "lifecycle").wait(300) == 0  # and finishes the killed one's
    wait_until(lambda: killed.exists() and not left_by(tracefs, victim.pid))
    assert everything(tracefs) == before

    in_killed = open_recording(killed).events().count("kvm_userspace_exit")
    assert ours == LIFECYCLE_USERSPACE_EXITS
    instance, bpftrace = others.seen()
    assert instance == bpftrace
    assert 0 <= instance - 2 * LIFECYCLE_USERSPACE_EXITS - in_killed <= 1  # the killed guest's last one
