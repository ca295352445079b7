"""Every bundled guest as it was really recorded, beside its prediction: no difference."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvmtrace.formats import open_recording
from kvmtrace.predict.align_recording import replay_events, replay_recording
from kvmtrace.predict.replayed import replayed
from kvmtrace.render.text.replay_text import render_replay
from kvmtrace.workload.arm64_guests import ARM64_GUESTS

FIXTURES = Path(__file__).parents[2] / "fixtures"
HOSTS = [f"{isa}-{kernel}" for isa in ("vmx", "svm") for kernel in ("6.1", "6.12")]
GUESTS = ("lifecycle", "interrupt", "smp", "string-io", "mmio-split", "triple-fault", "msr-gp", "storm")


NESTED = [("svm-6.1", "nested"), ("svm-6.12", "nested")]


@pytest.mark.parametrize(("host", "guest"), [(host, guest) for host in HOSTS for guest in GUESTS] + NESTED)
def test_fixture_is_as_predicted(host: str, guest: str) -> None:
    replay = replay_recording(open_recording(str(FIXTURES / f"{host}-{guest}.dat")))
    assert replay is not None
    assert replay.differences == (), render_replay(replayed(replay))
    assert replay.n_matched == replay.n_steps
    assert (replay.guest, replay.isa) == (guest, host.partition("-")[0])
    # the world switch is bracketed by probes there, and every KVM_RUN by its system call
    assert {f"{replay.isa}_vcpu_run", "kvm_entry", "kvm_exit", "sys_enter_ioctl"} <= set(replay.events)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("arm64-*.dat")), ids=lambda path: path.stem)
def test_arm64_fixture_is_as_predicted(path: Path) -> None:
    replay = replay_recording(open_recording(str(path)))
    assert replay is not None
    assert replay.differences == (), render_replay(replayed(replay))
    assert replay.n_matched == replay.n_steps > 20
    assert replay.isa == "arm64"
    assert replay.guest in ARM64_GUESTS
    assert {"kvm_entry", "kvm_exit", "sys_enter_ioctl", "kvm_vcpu_ioctl"} <= set(replay.events)


@pytest.mark.parametrize("name", ["arm64-6.1-smp", "arm64-6.1-dabt-split", "vmx-6.1-lifecycle"])
def test_a_guest_that_did_not_live_to_tell_is_compared_too(name: str) -> None:
    """What the recorder knows beforehand: the guest's name; ISA and threads are the events'."""
    recording = open_recording(str(FIXTURES / f"{name}.dat"))
    guest = name.split("-", 2)[2]
    target = {"kind": "guest", "guest": guest, "guest_arguments": []}
    capture = replace(recording.capture, meta={**recording.capture.meta, "guest_run": None, "target": target})
    replay = replay_events(capture, recording.events())
    assert replay is not None
    assert (replay.guest, replay.differences) == (guest, ())


@pytest.mark.parametrize("arguments", [[], ["--count", "3"]], ids=["default", "count-3"])
@pytest.mark.parametrize("guest", [name for name in GUESTS if name != "storm"])
@pytest.mark.kvm
def test_recording_of_this_machine_is_as_predicted(guest: str, arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "guest.dat"
    command = [sys.executable, "-m", "kvmtrace", "record", "--guest", guest, *arguments, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    replay = replay_recording(open_recording(str(path)))
    assert replay is not None
    assert replay.differences == (), render_replay(replayed(replay))
    assert replay.n_matched == replay.n_steps > 20
