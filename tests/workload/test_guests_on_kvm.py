"""Every guest on this machine's KVM: it ends well, and counts agree with what its listing says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from kvmtrace.workload import GUESTS, GuestRun, run_guest
from kvmtrace.workload.host_isa import guess_isa
from kvmtrace.workload.result import SCHEMA

pytestmark = pytest.mark.kvm
SMALL = {"storm": {"count": 1009}, "interrupt": {"count": 7, "period": 300_000}}


HERE = guess_isa()
RUNNABLE = [name for name, guest in GUESTS.items() if HERE not in guest.on(HERE).refused]
REFUSED = [name for name in GUESTS if name not in RUNNABLE]


@pytest.mark.parametrize("name", REFUSED)
def test_a_guest_that_this_kvm_cannot_run_is_refused_before_anything_is_recorded(name: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "kvmtrace", "record", "--guest", name, "-o", str(tmp_path / "out.dat")]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 4
    assert f"guest {name} cannot run on {HERE}" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RUNNABLE)
def test_guest_ends_as_it_should(name: str) -> None:
    run = run_guest(name, SMALL.get(name), timeout_s=300)
    assert run.succeeded, run
    seen = {reason: n for reason, n in run.observed.items() if reason.startswith("KVM_EXIT")}
    assert seen == run.known.userspace_exits
    assert set(run.observed) - set(seen) <= {"EAGAIN", "EINTR"}
    assert list(run.vcpu_tids) == list(range(GUESTS[name].n_vcpus))
    assert run.pid == os.getpid()
    assert run.pid not in run.vcpu_tids.values()


def test_vcpu_threads_are_named_as_qemu_names_them() -> None:
    names = set()

    def watch() -> None:
        while not stop.is_set():
            for task in Path("/proc/self/task").iterdir():
                try:
                    names.add((task / "comm").read_text().strip())
                except OSError:
                    continue  # it ended meanwhile
            time.sleep(0.001)

    stop = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_guest("smp", {"count": 300})
    finally:
        stop.set()
        watcher.join()
    assert {"CPU 0/KVM", "CPU 1/KVM"} <= names


def test_a_guest_that_does_not_end_is_stopped() -> None:
    start = time.monotonic()
    run = run_guest("interrupt", {"period": 4_000_000_000, "count": 100}, timeout_s=0.3)
    assert (run.ended, run.succeeded) == ("timeout", False)
    assert time.monotonic() - start < 200  # of 400 that it would have taken


def test_slow_reason_slows_that_reason_only() -> None:
    """61 PIO exits of 2 ms each are 122 ms more; the counts stay."""
    fast, slow = run_guest("lifecycle"), run_guest("lifecycle", slow_ns={"io": 2_000_000})
    assert slow.duration_ns - fast.duration_ns > 0.8 * 61 * 2_000_000
    assert slow.observed == fast.observed
    assert (fast.slowed, slow.slowed) == ({}, {"io": 2_000_000})


class Child:
    """The workload as a recorder starts it: three pipes."""

    def __init__(self, *argv: str) -> None:
        self.ready, ready = os.pipe()
        go, self.go = os.pipe()
        self.json, result = os.pipe()
        fds = (ready, go, result)
        command = [
            sys.executable,
            "-m",
            "kvmtrace.workload",
            *argv,
            "--ready-fd",
            str(ready),
            "--go-fd",
            str(go),
            "--json-fd",
            str(result),
        ]
        self.process = subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for fd in fds:
            os.close(fd)

    def result(self) -> dict[str, object]:
        with os.fdopen(self.json) as stream:
            return json.load(stream)

    def close(self) -> tuple[bytes, bytes]:
        os.close(self.ready)
        return self.process.communicate(timeout=300)


def test_handshake() -> None:
    child = Child("lifecycle", "--count", "2")
    assert os.read(child.ready, 2) == b"R"
    assert os.read(child.ready, 1) == b""  # closed
    held = [os.readlink(fd) for fd in Path(f"/proc/{child.process.pid}/fd").iterdir()]
    assert not any("kvm" in target for target in held)  # not before the go
    os.write(child.go, b"G")
    os.close(child.go)
    run = GuestRun.from_dict(child.result())
    assert child.close() == (b"", b"")
    assert child.process.returncode == 0
    assert (run.guest, run.arguments, run.pid) == ("lifecycle", {"count": 2}, child.process.pid)


def test_recorder_gives_up() -> None:
    child = Child("lifecycle")
    os.read(child.ready, 1)
    os.close(child.go)
    with os.fdopen(child.json) as stream:
        assert stream.read() == ""
    child.close()
    assert child.process.returncode == 1


def test_error_reaches_the_recorder() -> None:
    child = Child("nothing")
    assert os.read(child.ready, 1) == b""  # it never became ready
    os.close(child.go)
    assert child.result() == {
        "schema": SCHEMA,
        "guest": "nothing",
        "exit_code": 2,
        "error": "there is no guest nothing; there are " + ", ".join(GUESTS),
    }
    _, error = child.close()
    assert child.process.returncode == 2
    assert error.count(b"\n") == 1


@pytest.fixture
def instance():
    """An own tracefs instance, removed afterwards."""
    folder = Path(f"/sys/kernel/tracing/instances/kvmtrace-test-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir()
    (folder / "buffer_size_kb").write_text("8192")
    (folder / "options/event-fork").write_text("1")
    yield folder
    (folder / "events/enable").write_text("0")
    folder.rmdir()


@pytest.mark.parametrize("name", RUNNABLE)
def test_ftrace_counts_what_the_listing_says(name: str, instance: Path) -> None:
    """The kernel's own trace events, of that process alone, against the known counts."""
    child = Child(name, *(f"--arg={key}={value}" for key, value in SMALL.get(name, {}).items()))
    os.read(child.ready, 1)
    (instance / "set_event_pid").write_text(str(child.process.pid))
    (instance / "events/kvm/enable").write_text("1")
    os.write(child.go, b"G")
    os.close(child.go)
    run = GuestRun.from_dict(child.result())
    child.close()
    lines = (instance / "trace").read_text().splitlines()
    counts = Counter(line.split(": ")[1] for line in lines if not line.startswith("#") and ": " in line)
    assert run.known.tracepoints
    # a known count is exact, nothing more may have happened
    assert {event: counts[event] for event in run.known.tracepoints} == run.known.tracepoints
    assert counts["kvm_userspace_exit"] == sum(run.observed.values())
