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

from tests.capture.bpf_held import forgotten_programs
from tests.watch.test_exporter import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    with urllib.request.urlopen(url, timeout=120) as answer:
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
    until = time.monotonic() + 60
    while forgotten_programs() - before and time.monotonic() < until:
        time.sleep(0.1)
    assert not forgotten_programs() - before


def test_counters_are_the_guests_truth_and_go_with_it() -> None:
    before = forgotten_programs()
    with exporting("--linger", "2") as url:
        runs = [run_guest("lifecycle", "--count", "20"), run_guest("mmio-split")]
        samples = scrape(url)
        names = {s.labels["pid"]: s.labels["vm"] for s in samples if s.name == "kvm_vm_info"}
        for run in runs:
            found = counts_of(samples, names[str(run["pid"])])
            known = run["known"]["userspace_exits"]
            assert {reason: found.get(reason) for reason in known} == known
        lost = [s.value for s in samples if s.name == "kvmtrace_lost_events_total"]
        assert lost
        assert not any(lost)
        time.sleep(4)
        for _ in range(2):
            samples = scrape(url)
        assert not [s for s in samples if "vm" in s.labels]
    assert_unloaded(before)
