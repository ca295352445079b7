"""What is written to be shared: nothing secret with --anonymize, nothing for others without."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fuzz.seeds import META, event, summary, trace_dat, vm_entry, vm_exit
from writers.ring_buffer import page, record

from kvmtrace.cli.main import cli
from kvmtrace.cli.output import write_text
from kvmtrace.formats import open_recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
ADDRESS_FIELDS = {"rip", "guest_rip", "gpa", "gva", "address", "fault_address"}
GUEST_RIP = 0xFFFFFFFF81234567
SECRETS = {
    "host": "secrethost",
    "cpu_model": "Secret CPU",
    "command": ["kvmtrace", "record", "/home/alice/vm.img"],
    "threads": {"77": [70, "alice-vcpu"], "42": [70, "alice-vm"]},
    "notes": ["for alice"],
    "qmp": {"error": "/run/alice.sock: refused"},
    "target": {"kind": "command", "pids": [70], "command": ["/home/alice/qemu"]},
}
WORDS = re.compile("secret|alice|lifecycle|run\\.dat", re.IGNORECASE)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stdout  # a line of what another test left interrupted may stand on standard error


@pytest.fixture
def secret(tmp_path):
    """A recording that contradicts the model, and names a person in every place where there is room."""
    switch = struct.pack("<iIq", 42, 0, -7)
    records = [
        record(e, 7)
        for i in range(4)
        for e in (
            vm_entry(GUEST_RIP + i),
            vm_exit(GUEST_RIP + i),
            vm_exit(GUEST_RIP + 9 * i, 30),
            event(12, b"alice-vm".ljust(16, b"\0") + switch),
        )
    ]
    path = tmp_path / "alice-run.dat"
    path.write_bytes(trace_dat("v6", instances={"kt": [page(900, records)]}, meta={**META, **SECRETS}))
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("report",),
        ("report", "--format", "json"),
        ("report", "--format", "html"),
        ("report", "--by", "rip"),
        ("report", "--explain", "2"),
        ("check",),
        ("check", "--format", "json"),
    ],
)
def test_nothing_secret_is_left(secret, arguments):
    plain = run(*arguments, secret)
    hidden = run(*arguments, secret, "--anonymize")
    assert len(hidden) > 200
    # what is to be hidden is there otherwise: a story names addresses only
    assert f"{GUEST_RIP:x}"[:12] in plain or str(GUEST_RIP) in plain or "alice" in plain
    assert not re.findall("secret|alice", hidden, re.IGNORECASE)
    assert f"{GUEST_RIP:x}"[:12] not in hidden
    assert str(GUEST_RIP) not in hidden


def test_a_violation_is_still_one(secret):
    plain, hidden = (json.loads(run("check", "--format", "json", secret, *more)) for more in ((), ("--anonymize",)))
    rules = [[v["rule"] for v in document["model"]["violations"]] for document in (plain, hidden)]
    assert rules[0] == rules[1] != []


@pytest.mark.parametrize("output_format", ["text", "json", "html"])
def test_a_comparison_names_no_file(output_format):
    path = FIXTURES / "svm-6.1-lifecycle.dat"
    assert "svm-6.1-lifecycle" in run("compare", path, path, "--format", output_format)
    assert "lifecycle" not in run("compare", path, path, "--format", output_format, "--anonymize")


@pytest.mark.parametrize("output_format", ["text", "json"])
def test_a_summary_names_nobody(tmp_path, output_format):
    value = json.loads(summary())
    value["meta"] |= SECRETS
    value["vcpus"][0]["comm"] = "alice-vcpu"
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(value, separators=(",", ":")))
    assert re.search("secret|alice", run("report", path, "--format", output_format))
    hidden = run("report", path, "--format", output_format, "--anonymize")
    assert not re.search("secret|alice", hidden)
    assert "thread-1" in hidden


@pytest.mark.parametrize("name", ["svm-6.1-linux-1vcpu", "vmx-6.1-lifecycle"])
@pytest.mark.parametrize("output_format", ["text", "json", "html"])
def test_real_recordings(name, output_format):
    """No guest address of a Linux boot, no thread name, in any number of the report."""
    path = FIXTURES / f"{name}.dat"
    recording = open_recording(path)
    table, meta = recording.events(), recording.capture.meta
    addresses = {
        int(value)
        for kind in table.kinds
        for field in ADDRESS_FIELDS & set(kind.fields)
        for value in np.unique(table.field(kind.name, field))
        if value >= 1 << 16
    }
    names = {comm for _, comm in meta["threads"].values()} | {meta["host"], meta["cpu_model"], path.stem}
    hidden = run("report", path, "--format", output_format, "--anonymize")
    numbers = {int(text, 16) for text in re.findall(r"0x([0-9a-fA-F]+)", hidden)}
    numbers |= {int(text) for text in re.findall(r"\b\d{6,20}\b", hidden)}
    assert not numbers & addresses
    assert not [word for word in names - {"kvmtrace", "record", "init"} if word in hidden]


@pytest.fixture
def shared(tmp_path):
    """A shared directory in which somebody has planted links, and what they lead to."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o777)
    return folder, victim


@pytest.mark.parametrize("name", ["report.txt", "report.html", "compare.txt", "run.csv"])
def test_outputs_are_private_whole_and_follow_no_link(shared, name):
    folder, victim = shared
    path = FIXTURES / "svm-6.1-lifecycle.dat"
    output = folder / name
    output.symlink_to(victim)
    command = {
        "report.txt": ["report", path],
        "report.html": ["report", "--format", "html", path],
        "compare.txt": ["compare", path, path],
        "run.csv": ["export", path],
    }[name]
    run(*command, "-o", output)
    assert victim.read_text() == "precious"
    assert not output.is_symlink()
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert output.stat().st_size > 1000
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_device_is_written_to(tmp_path):
    write_text(Path("/dev/null"), "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "old"
    path.write_text("old")
    with pytest.raises(AttributeError):
        write_text(path, None)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_under_sudo_the_file_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", "65534")
    write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").stat().st_uid == 65534
