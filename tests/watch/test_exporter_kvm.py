"""The exporter beside a guest with known counts, on this machine's KVM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmtrace.formats import open_recording
from kvmtrace.report.build import build_report
from tests.capture.bpf_held import forgotten_programs
from tests.watch.test_exporter import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kvm


@contextlib.contextmanager
def exporting(*arguments: str) -> Iterator[str]:
    port = free_port()
    argv = [sys.executable, "-m", "kvmtrace", "exporter", "--listen", f"127.0.0.1:{port}", *arguments]
    running = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        assert "exporting at" in running.stderr.readline()
        yield f"http://127.0.0.1:{port}/metrics"
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 0
    finally:
        running.kill()
        running.communicate()


def run_guest(name: str, *arguments: str) -> dict[str, Any]:
    """Run a bundled guest; return what its VMM says of it."""
    fd = os.memfd_create("run")
    argv = [sys.executable, "-P", "-m", "kvmtrace.workload", name, *arguments, "--json-fd", str(fd)]
    subprocess.run(argv, pass_fds=(fd,), check=True, stdout=subprocess.DEVNULL)
    run: dict[str, Any] = json.loads(os.pread(fd, 1 << 20, 0))
    os.close(fd)
    return run


def scrape(url: str) -> list[Any]:
    with urllib.request.urlopen(url, timeout=300) as answer:
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def counts_of(samples: list[Any], vm: str) -> dict[str, float]:
    return {
        sample.labels["reason"]: sample.value
        for sample in samples
        if sample.name == "kvm_userspace_exits_total" and sample.labels["vm"] == vm
    }


def assert_unloaded(before: set[int]) -> None:
    """The kernel frees a program some time after its last user is gone; others' users may live."""
    until = time.monotonic() + 300
    while forgotten_programs() - before and time.monotonic() < until:
        time.sleep(0.1)
    assert not forgotten_programs() - before


def guest_and_samples(url: str, *arguments: str) -> tuple[dict[str, Any], list[Any], str]:
    """Run a guest; return what it says of itself, what the exporter does, and its VM's name there.

    On a busy machine one may be forgotten before the exporter is asked: another is run then.
    """
    for _ in range(10):
        run, samples = run_guest(*arguments), scrape(url)
        names = {s.labels["pid"]: s.labels["vm"] for s in samples if s.name == "kvm_vm_info"}
        if str(run["pid"]) in names:
            return run, samples, names[str(run["pid"])]
    pytest.fail("the exporter knew none of ten guests behind their ends")


def without_vms(url: str) -> list[Any]:
    """Return the samples once those of all guests, which have ended, are gone."""
    until = time.monotonic() + 300
    while any("vm" in sample.labels for sample in scrape(url)):
        assert time.monotonic() < until
        time.sleep(0.5)
    return scrape(url)


def test_counters_are_the_guests_truth_and_go_with_it() -> None:
    before = forgotten_programs()
    with exporting("--linger", "4") as url:
        for arguments in (("lifecycle", "--count", "20"), ("mmio-split",)):
            run, samples, vm = guest_and_samples(url, *arguments)
            found, known = counts_of(samples, vm), run["known"]["userspace_exits"]
            assert {reason: found.get(reason) for reason in known} == known
        lost = [s.value for s in samples if s.name == "kvmtrace_lost_events_total"]
        assert lost
        assert not any(lost)
        without_vms(url)
    assert_unloaded(before)


@contextlib.contextmanager
def forked_guest() -> Iterator[int]:
    """Run a small guest in a process of its own, without an interpreter's start."""
    from kvmtrace.workload import run_guest as run_here

    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            status = not run_here("lifecycle", {"count": 2}).succeeded
        os._exit(status)
    yield pid
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.slow
def test_two_hundred_vms_leave_no_series_and_no_leak() -> None:
    before = forgotten_programs()
    with exporting("--linger", "1") as url:
        memory = []
        for _ in range(4):
            for _ in range(50):
                with forked_guest():
                    pass
            samples = without_vms(url)
            named = {s.name: s.value for s in samples if not s.labels}
            assert named["kvmtrace_vcpu_threads"] == 0
            memory.append(named["process_resident_memory_bytes"])
        assert memory[-1] < memory[0] + (1 << 20)
        assert named["process_open_fds"] < 100
    assert_unloaded(before)


@pytest.mark.slow
def test_quantiles_are_within_their_bucket_of_the_recordings_own(tmp_path: Path) -> None:
    """The same exits, counted and recorded: a quantile of the recording lies in the bucket of its rank."""
    output = tmp_path / "run.dat"
    guest = [
        sys.executable,
        "-P",
        "-m",
        "kvmtrace.workload",
        "lifecycle",
        "--count",
        "10",
        "--slow-reason",
        "io:3000000",
    ]
    with exporting("--linger", "60") as url:
        record = [sys.executable, "-m", "kvmtrace", "record", "--backend", "ftrace", "-o", str(output), "--", *guest]
        subprocess.run(record, check=True, capture_output=True)
        samples = scrape(url)
    report = build_report(open_recording(output))
    pid = str(report.vcpus[0].pid)
    (vm,) = (s.labels["vm"] for s in samples if s.name == "kvm_vm_info" and s.labels["pid"] == pid)
    (row,) = (row for row in report.userspace_exits if row.name == "KVM_EXIT_IO")  # others are shorter than two tracers
    buckets = {
        float(s.labels["le"]) * 1e9: s.value
        for s in samples
        if s.name == "kvm_userspace_exit_duration_seconds_bucket"
        and (s.labels["vm"], s.labels["reason"]) == (vm, row.name)
    }
    for share, own in ((0.5, row.p50_ns), (0.9, row.p90_ns), (0.99, row.p99_ns)):
        rank = share * buckets[float("inf")]
        upper = min(bound for bound, count in buckets.items() if count >= rank)
        assert own is not None
        assert upper / 2 * 0.9 <= own <= upper * 1.1, (row.name, share)
