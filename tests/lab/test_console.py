"""Following a lab host: its console, the limits, what is left when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmtrace.lab.emulator import Console, Emulator, LabFailedError, Limits, run_emulator

GOOD = """
echo "[ 1.0] kvmtrace-lab: started" >>console; echo out >>stdout; echo err >>stderr
echo "[ 2.0] kvmtrace-lab: ended 3" >>console; echo "[ 2.1] kvmtrace-lab: exit 3" >>console
"""


def emulator(folder: Path, script: str) -> Emulator:
    paths = {name: folder / name for name in ("console", "stdout", "stderr", "results", "log")}
    return Emulator("QEMU", ["sh", "-c", script], folder, **paths)


def run(folder: Path, script: str, boot_s: float = 20, command_s: float = 20):
    output: dict[int, bytes] = {1: b"", 2: b""}
    phases: list[str] = []

    def write(stream: int, data: bytes) -> None:
        output[stream] += data

    outcome = run_emulator(emulator(folder, script), Limits(boot_s, command_s), write, phases.append)
    return outcome, output, phases


def test_a_run_gives_status_output_and_phases(tmp_path: Path):
    outcome, output, phases = run(tmp_path, GOOD)
    assert outcome.status == 3
    assert output == {1: b"out\n", 2: b"err\n"}
    assert phases == ["booting", "running", "fetching"]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'BIOS error' >console; exit 1", "ended before the lab host was done (exit code 1)"),
        ("kill -SEGV $$", "ended before the lab host was done (signal 11)"),
        ("echo '[1.0] Kernel panic - not syncing: VFS: no root' >console; sleep 60", "kernel panicked: VFS: no root"),
        ("echo 'kvmtrace-lab: failed module kvm_amd: no SVM' >console; sleep 60", "module kvm_amd: no SVM"),
    ],
)
def test_failures_say_why_with_the_last_lines(tmp_path: Path, script: str, says: str):
    with pytest.raises(LabFailedError) as caught:
        run(tmp_path, script)
    assert says in str(caught.value)
    assert caught.value.exit_code == 4
    if "echo" in script:
        assert "console ended with:\n  | " in str(caught.value)


def test_a_console_that_lost_lines_still_ends_the_run(tmp_path: Path):
    outcome, _, phases = run(tmp_path, "echo kvmtrace-lab: exit 3 >console")
    assert outcome.status == 3
    assert phases == ["booting", "running", "fetching"]


def test_an_empty_console_shows_what_the_emulator_said(tmp_path: Path):
    with pytest.raises(LabFailedError, match="no such machine"):
        run(tmp_path, "echo no such machine; exit 1")


def test_boot_and_command_have_their_limits_and_nothing_survives(tmp_path: Path):
    with pytest.raises(LabFailedError, match="did not boot within 0 s"):
        run(tmp_path, "echo $$ >pid; sleep 300", boot_s=0.3)
    with pytest.raises(LabFailedError, match=r"command did not end within 0 s \(--timeout\)"):
        run(tmp_path, "echo $$ >pid2; echo kvmtrace-lab: started >console; sleep 300", command_s=0.3)
    for name in ("pid", "pid2"):
        assert not Path(f"/proc/{(tmp_path / name).read_text().strip()}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_kvmtrace_ends_the_emulator(tmp_path: Path, number: signal.Signals):
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from test_console import run\nfrom pathlib import Path\n"
        f"run(Path({str(tmp_path)!r}), 'echo $$ >pid; exec sleep 300')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 300
    while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    emulator_pid = int(pid_file.read_text())
    os.kill(process.pid, number)
    assert process.wait(timeout=300) != 0
    while Path(f"/proc/{emulator_pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{emulator_pid}").exists()


def test_marks_are_read_across_cuts_and_noise():
    text = b"[ 1.0] kvmtrace-lab: started\r\nnoise \x1b[31m\r\n[ 9.9] kvmtrace-lab: exit 17\r\n"
    for cut in range(len(text)):
        console = Console()
        console.feed(text[:cut])
        console.feed(text[cut:])
        assert console.started
        assert console.finished == 17
        assert "\x1b" not in console.last_lines()


def test_a_forged_mark_does_not_break_the_reader():
    console = Console()
    console.feed(b"kvmtrace-lab: exit nonsense\nkvmtrace-lab: \nkvmtrace-lab: ended -1\n")
    assert console.finished is None
    assert console.ended is None
