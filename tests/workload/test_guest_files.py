"""Guests of one's own, read from files; those that `report --explain N --as-guest` writes repeat what was recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import iced_x86
import numpy as np
import pytest

from kvmtrace.check.explain import exits_of, read_event
from kvmtrace.errors import FormatError, UsageError
from kvmtrace.formats import open_recording
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.predict.guest_prediction import predict
from kvmtrace.predict.reproducer import reproduce
from kvmtrace.predict.story import Facts
from kvmtrace.render.text.reproducer_text import render_listing
from kvmtrace.workload.guest_file import read_guest
from kvmtrace.workload.listing import parse_listing
from kvmtrace.workload.machines import find_guest

ROOT = Path(__file__).parents[2]
OF_PCS = sorted(path for path in (ROOT / "fixtures").glob("*.dat") if not path.name.startswith("arm64-"))
DOCS = (ROOT / "docs" / "guest-listings.md").read_text()
KEYS = {
    "kvm_pio": ("rw", "port", "size"),
    "kvm_cpuid": ("function",),
    "kvm_msr": ("write", "ecx"),
    "kvm_mmio": ("type", "gpa", "len"),
}
BUNDLED = ("lifecycle", "storm", "msr-gp")


def example() -> str:
    """Return the listing that the documentation shows."""
    lines = DOCS.split("```\n")[1].splitlines()
    return "\n".join([*lines, ""])


def test_the_documented_listing_is_a_guest(tmp_path: Path) -> None:
    path = tmp_path / "mine.lst"
    path.write_text(example())
    guest = read_guest(str(path))
    assert (guest.irqchip, guest.n_vcpus, guest.ends) == (False, 1, "exit-port")
    assert guest.listing.entry == 0x1000
    assert find_guest(str(path)).listing == guest.listing
    steps = predict(guest, {}, Facts("vmx"))[0].steps
    assert [step.event for step in steps].count("kvm_cpuid") == 3


def test_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.lst"
    path.write_text(";! irqchip\n" + example())
    assert read_guest(str(path)).irqchip
    path.write_text(";! warp\n" + example())
    with pytest.raises(UsageError, match="there is no option warp"):
        read_guest(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense\n", "not a row of a listing"),
        ("1000  f4    hlt\n", "a label start"),
        ("start:\n7fff  0f a2    cpuid\n", "0x8001"),
        ("; \xe9\n", "ASCII"),
    ],
)
def test_what_is_no_guest_is_located(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.lst"
    path.write_text(text)
    with pytest.raises(FormatError, match=words):
        read_guest(str(path))


def test_a_missing_file_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="No such file"):
        find_guest("/no/such/guest.lst")


def recorded(path: Path) -> tuple[str, int, list[tuple[object, ...]]]:
    """Return a fixture's ISA, how many VM-exits its first vCPU has, and what its follow-ups are about."""
    table = open_recording(str(path)).events()
    exits = exits_of(table, None, None)
    rows = np.flatnonzero(table.tid == table.tid[exits[0]])
    found: list[tuple[object, ...]] = []
    isa = ""
    for row in rows[rows >= exits[0]]:
        kind = table.kinds[table.kind[row]].name
        if kind == "kvm_exit":
            fields = read_event(table, int(row)).fields
            isa = {1: "vmx", 2: "svm"}[int(fields["isa"])]
            if BY_NAME[isa].describe(int(fields["exit_reason"])).lower() == "hlt":
                found.append(("hlt",))
        elif kind in KEYS:
            fields = read_event(table, int(row)).fields
            found.append((kind, *(int(fields[key]) for key in KEYS[kind])))
    return isa, len(exits), found


def predicted(listing: str, name: str, isa: str, folder: Path) -> list[tuple[object, ...]]:
    """Return what the model predicts of a listing's follow-ups."""
    path = folder / f"{name}.lst"
    path.write_text(listing)
    found: list[tuple[object, ...]] = []
    for step in predict(read_guest(str(path)), {}, Facts(isa))[0].steps:
        fields = {item.name: item.value for item in step.fields}
        if step.event == "kvm_exit" and BY_NAME[isa].describe(int(fields["exit_reason"])).lower() == "hlt":
            found.append(("hlt",))
        elif step.event in KEYS:
            found.append((step.event, *(fields[key] for key in KEYS[step.event])))
    return found


@pytest.mark.parametrize("guest", BUNDLED)
@pytest.mark.parametrize("host", ["vmx-6.1", "svm-6.1", "svm-6.12"])
def test_bundled_guests_come_back(host: str, guest: str, tmp_path: Path) -> None:
    """What was recorded of a bundled guest is what the model predicts of the guest that repeats it."""
    path = ROOT / "fixtures" / f"{host}-{guest}.dat"
    isa, n_exits, wanted = recorded(path)
    found = reproduce(open_recording(str(path)).events(), n_exits)
    again = predicted(render_listing(found, str(path)), guest, isa, tmp_path)
    first = len(wanted) - len(again)  # of very many exits, only the last fit into a guest
    assert first >= 0
    assert again == wanted[first:]
    assert first == 0 or found.first > 1
    assert found.left_out == {}
    assert len(again) > 10


@pytest.mark.parametrize("path", OF_PCS, ids=lambda path: path.stem)
def test_every_fixture_gives_a_listing_whose_bytes_are_its_text(path: Path) -> None:
    events = open_recording(str(path)).events()
    number = min(len(exits_of(events, None, None)), 400)
    text = render_listing(reproduce(events, number), str(path))
    for line in parse_listing("x", text).lines:
        decoder = iced_x86.Decoder(16, line.code, ip=line.address)
        instruction = decoder.decode()
        assert instruction.len == len(line.code), line
        shown = iced_x86.Formatter(iced_x86.FormatterSyntax.NASM).format(instruction)
        assert line.is_data or shown.split()[0] == line.text.split()[0], (shown, line)


def test_an_architecture_without_such_guests_is_refused() -> None:
    events = open_recording(str(ROOT / "fixtures" / "arm64-6.1-lifecycle.dat")).events()
    with pytest.raises(UsageError, match="no such guests for arm64"):
        reproduce(events, 5)


def test_the_command(tmp_path: Path) -> None:
    fixture = ROOT / "fixtures" / "vmx-6.1-storm.dat"
    out = tmp_path / "again.lst"
    command = [sys.executable, "-m", "kvmtrace", "report", fixture]
    done = subprocess.run([*command, "--explain", "9", "--as-guest", "-o", out], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "repeats VM-exits 1 to 9" in out.read_text()
    assert read_guest(str(out)).listing.entry == 0x4000
    for words in (["--as-guest"], ["--as-guest", "--explain", "100000"]):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr


@pytest.mark.kvm
def test_a_reproducer_runs(tmp_path: Path) -> None:
    events = open_recording(str(ROOT / "fixtures" / "svm-6.1-lifecycle.dat")).events()
    guest = tmp_path / "again.lst"
    guest.write_text(render_listing(reproduce(events, 135), "lifecycle"))
    out = tmp_path / "run.dat"
    command = [sys.executable, "-m", "kvmtrace", "record", "--guest", guest, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "report", "--format", "json", out],
        capture_output=True,
        text=True,
        check=True,
    )
    exits = {row["name"]: row["count"] for row in json.loads(shown.stdout)["userspace_exits"]}
    assert exits["KVM_EXIT_HLT"] >= 5
    assert exits["KVM_EXIT_MMIO"] >= 36
