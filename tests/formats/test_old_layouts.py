"""Binary recordings in the layouts of older kernels: what a field meant then is what it is read as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from writers.in_memory import InMemory
from writers.packing import unpacked

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.formats.known_formats import recognise

FIXTURES = Path(__file__).parents[2] / "fixtures"
BEFORE_5_10 = ((b"info2;", b"xnfo2;"), (b"intr_info;", b"info2;    "), (b"error_code;", b"xrror_code;"),
               (b"vcpu_id;", b"xcpu_id;"))  # fmt: skip


def renamed(name: str, event: bytes, changes) -> bytes:
    """Return a fixture whose format of an event has other names, of the same length."""
    data = bytearray(unpacked(FIXTURES / f"{name}.dat"))
    at = data.index(b"name: " + event + b"\n")
    end = data.index(b"print fmt", at)
    text = bytes(data[at:end])
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    data[at:end] = text
    return bytes(data)


@pytest.mark.parametrize("name", ["vmx-6.12-linux-1vcpu", "vmx-6.1-interrupt"])
def test_info2_before_5_10_is_the_cause_and_no_vectoring(name):
    recording = recognise(InMemory(renamed(name, b"kvm_exit", BEFORE_5_10)))
    events, now = recording.events(), open_recording(FIXTURES / f"{name}.dat").events()
    assert not events.has("kvm_exit", "info2")
    assert (events.field("kvm_exit", "intr_info") == now.field("kvm_exit", "intr_info")).all()
    found = check_recording(recording)
    assert not found.violations
    assert found.rules["V2"].held


def test_info2_of_the_other_isa_stays():
    changes = ((b"intr_info;", b"xntr_info;"), (b"error_code;", b"xrror_code;"), (b"vcpu_id;", b"xcpu_id;"))
    events = recognise(InMemory(renamed("svm-6.1-smp", b"kvm_exit", changes))).events()
    now = open_recording(FIXTURES / "svm-6.1-smp.dat").events()
    assert np.array_equal(events.field("kvm_exit", "info2"), now.field("kvm_exit", "info2"))


def test_an_entry_without_rip():
    """As before 5.7."""
    recording = recognise(InMemory(renamed("svm-6.1-smp", b"kvm_entry", ((b"rip;", b"xip;"),))))
    found = check_recording(recording)
    assert not found.n_violations
    assert not recording.events().has("kvm_entry", "rip")
