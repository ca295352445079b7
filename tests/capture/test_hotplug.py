"""A VM that gets another vCPU while it is recorded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
KVM_CREATE_VCPU = 0xAE41  # include/uapi/linux/kvm.h
QEMU = [
    "qemu-system-x86_64",
    "-accel",
    "kvm",
    "-m",
    "64",
    "-smp",
    "1,maxcpus=2",
    "-display",
    "none",
    "-nodefaults",
    "-no-user-config",
]


class Monitor:
    """The write side of a QMP socket, which the recorder never uses."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        until = time.monotonic() + 300
        while self.socket.connect_ex(str(path)):
            assert time.monotonic() < until
            time.sleep(0.05)
        self.stream = self.socket.makefile("rwb")
        self.stream.readline()
        self.ask("qmp_capabilities")

    def ask(self, execute: str, **arguments: Any) -> Any:
        self.stream.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        self.stream.flush()
        while "return" not in (answer := json.loads(self.stream.readline())):
            assert "error" not in answer, answer
        return answer["return"]

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
def test_a_vcpu_that_is_plugged_in_is_recorded(tmp_path: Path, backend: str) -> None:
    path, output = tmp_path / "qmp", tmp_path / "hot.dat"
    argv = [
        sys.executable,
        "-m",
        "kvmtrace",
        "record",
        "--backend",
        backend,
        "-o",
        str(output),
        "--",
        *QEMU,
        "-qmp",
        f"unix:{path},server=on,wait=off",
    ]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as recorder:
        monitor = Monitor(path)
        slot = next(one for one in monitor.ask("query-hotpluggable-cpus") if "qom-path" not in one)
        monitor.ask("device_add", driver=slot["type"], id="hot", **slot["props"])
        tids = [one["thread-id"] for one in monitor.ask("query-cpus-fast")]
        time.sleep(2)  # threads are looked at twice a second
        monitor.ask("quit")
        monitor.close()
        errors = recorder.communicate(timeout=300)[1]
    assert recorder.returncode == 0, errors
    recording = open_recording(output)
    table = recording.events()
    assert len(tids) == 2
    assert set(tids) <= set(table.tid.tolist())
    assert set(map(str, tids)) <= set(recording.capture.meta["threads"])
    created = table.field("sys_enter_ioctl", "arg")[table.field("sys_enter_ioctl", "cmd") == KVM_CREATE_VCPU]
    assert created.tolist() == [0, 1]
    assert not check_recording(recording).n_violations
    assert recording.capture.meta["ended_by"] == "target"
    assert [name for name in os.listdir(tmp_path) if "kvmtrace-" in name] == []
