"""A host CPU goes offline and comes back while it is recorded (in the lab: this machine keeps its CPUs)."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.slow]

STORM = 3000
LIFECYCLE_CPUIDS = 13
COMMANDS = f"""
online=/sys/devices/system/cpu/cpu1/online
guest() {{ taskset 2 {sys.executable} -m kvmtrace.workload "$@" >/dev/null || exit 1; }}
running() {{ [ -s .$1.kvmtrace-*/out ] || grep -q 1 /sys/kernel/tracing/instances/kvmtrace-*/tracing_on; }} 2>/dev/null
start() {{ kvmtrace record --backend $1 -a -o $1-$2 & recorder=$!; until running $1-$2; do sleep 0.2; done; }}
finish() {{ kill -INT $recorder; wait $recorder || exit 1; }}
for backend in ftrace bpf; do
  start $backend off   # CPU 1 leaves in the middle of a storm that runs on it, and comes back
  guest storm --count {STORM} & storm=$!
  sleep 0.5; echo 0 > $online || exit 2; wait $storm || exit 1
  echo 1 > $online; guest lifecycle; finish
  echo 0 > $online
  start $backend on    # CPU 1 comes only later
  echo 1 > $online; guest lifecycle; finish
done
ls /sys/kernel/tracing/instances; cat /sys/kernel/tracing/kprobe_events
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here, back = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("results")
    lab = [sys.executable, "-m", "kvmtrace", "lab", "run", "--isa", "svm", "--cpus", "2", "-o", str(back), "--"]
    done = subprocess.run([*lab, "bash", "-c", COMMANDS], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    assert done.stdout.strip() == ""  # no instance, no probe is left
    return back


@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
@pytest.mark.parametrize(("when", "cpuids"), [("off", STORM + LIFECYCLE_CPUIDS), ("on", LIFECYCLE_CPUIDS)])
def test_nothing_is_lost_when_a_cpu_leaves_or_comes(results: Path, backend: str, when: str, cpuids: int) -> None:
    recording = open_recording(results / f"{backend}-{when}")
    table = recording.events()
    assert recording.loss.events == 0
    assert not recording.loss.damage
    assert table.count("kvm_cpuid") == cpuids
    exits = table.rows("kvm_exit")
    assert np.count_nonzero(table.cpu[exits] == 1) >= LIFECYCLE_CPUIDS
    assert not check_recording(recording).n_violations
