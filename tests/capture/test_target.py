"""Targets: nothing runs before it is released, and nothing of ours is left running."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture.invoking_user import invoking_user
from kvmtrace.capture.settings import TargetSpec
from kvmtrace.capture.target import Target
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def shell(text: str) -> TargetSpec:
    return TargetSpec("command", command=("sh", "-c", text))


def wait(target: Target) -> None:
    assert target.pidfd is not None
    assert select.select([target.pidfd], [], [], 600)[0]
    assert target.ended()


def test_command_waits_for_its_release(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with Target(shell(f"touch {mark}; exit 7")) as target:
        assert target.tids() == [target.pid]
        time.sleep(0.1)
        assert not mark.exists()
        target.release()
        wait(target)
    assert target.status == 7
    assert mark.exists()


def test_unreleased_command_never_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with Target(shell(f"touch {mark}")) as target:
        pass
    assert target.status is not None
    assert not mark.exists()
    assert not Path(f"/proc/{target.pid}").exists()


def test_gate_opens_for_nobody_when_the_recorder_dies(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = (
        "import os\nfrom kvmtrace.capture.settings import TargetSpec\n"
        "from kvmtrace.capture.target import Target\n"
        f"t = Target(TargetSpec('command', command=('touch', {str(mark)!r})))\n"
        "print(t.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    until = time.monotonic() + 10  # a container's init may never reap it
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not mark.exists()


def test_signal_death_is_reported() -> None:
    with Target(shell("kill -9 $$")) as target:
        target.release()
        wait(target)
    assert target.status == -signal.SIGKILL


def test_a_command_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmtrace.capture.target.STOP_GRACE_S", 0.2)
    with Target(shell(f"trap '' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done")) as target:
        target.release()
        wait_until((tmp_path / "ready").exists)
    assert target.status == -signal.SIGKILL


def test_a_stopped_command_is_ended_too() -> None:
    with Target(shell("kill -STOP $$")) as target:
        target.release()
        wait_until(lambda: Path(f"/proc/{target.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    assert target.status == -signal.SIGTERM


def test_unknown_command() -> None:
    with pytest.raises(UsageError, match="no-such-command-here: command not found"):
        Target(TargetSpec("command", command=("no-such-command-here",)))


def test_a_file_that_cannot_be_executed(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x7fELF nonsense")
    bad.chmod(0o755)
    with Target(TargetSpec("command", command=(str(bad),))) as target, pytest.raises(UsageError, match="cannot run"):
        target.release()


def test_running_process_and_its_threads() -> None:
    with subprocess.Popen(["sleep", "5"]) as child, Target(TargetSpec("pid", pid=child.pid)) as target:
        assert target.tids() == [child.pid]
        assert not target.ended()
        child.kill()
        wait(target)
        assert target.status is None  # it is not ours
        assert target.tids() in ([], [child.pid])


def test_a_thread_id_means_its_process() -> None:
    tid = max(int(path.name) for path in Path("/proc/self/task").iterdir())
    with Target(TargetSpec("pid", pid=tid)) as target:
        assert target.pid == os.getpid()


def test_no_such_process() -> None:
    with pytest.raises(UsageError, match="there is no process 4194305"):
        Target(TargetSpec("pid", pid=4194305))  # above the largest pid_max


def test_whole_machine_has_no_process() -> None:
    with Target(TargetSpec("all")) as target:
        target.release()
        assert target.tids() == []
        assert not target.ended()


def test_commands_get_default_signals(tmp_path: Path) -> None:
    # Python ignores SIGPIPE (13) and SIGXFSZ (25); a recorded command must not inherit that
    with Target(shell(f"grep SigIgn /proc/self/status > {tmp_path}/out")) as target:
        target.release()
        wait(target)
    ignored = int((tmp_path / "out").read_text().split()[1], 16)
    assert not ignored & (1 << 12 | 1 << 24 | 1 << 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
class TestSudo:
    @pytest.fixture(autouse=True)
    def sudo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUDO_UID", "65534")
        monkeypatch.setenv("SUDO_GID", "65534")

    @staticmethod
    def identity(*, as_root: bool) -> list[str]:
        with tempfile.NamedTemporaryFile() as out:
            os.chmod(out.name, 0o666)
            command = ("sh", "-c", f"echo $(id -u) $(id -g) $(id -G) $HOME > {out.name}")
            with Target(TargetSpec("command", command=command, as_root=as_root)) as target:
                target.release()
                wait(target)
            return out.read().decode().split()

    def test_command_runs_as_the_invoking_user(self) -> None:
        assert invoking_user() == (65534, 65534)
        assert self.identity(as_root=False) == ["65534", "65534", "65534", "/nonexistent"]

    def test_as_root(self) -> None:
        assert self.identity(as_root=True)[:2] == ["0", "0"]

    def test_nonsense_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUDO_UID", "-1")
        with pytest.raises(UsageError, match="not a user"):
            invoking_user()

    def test_root_who_called_sudo_is_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUDO_UID", "0")
        assert invoking_user() is None
