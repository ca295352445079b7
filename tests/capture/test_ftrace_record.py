"""Recordings made on this machine: complete, readable by trace-cmd and by us, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.capture.ftrace import ftrace_recorder as ftrace
from kvmtrace.capture.ftrace.instance import Instance
from kvmtrace.capture.ftrace.page_mover import Reader
from kvmtrace.capture.ftrace.raw_pages import COMMIT_MASK, count_events, iter_events
from kvmtrace.capture.ftrace.trim import trim_head
from kvmtrace.capture.recorders import RUN_DIR
from kvmtrace.capture.settings import META_MAGIC, RecordResult, RecordSettings, TargetSpec
from kvmtrace.capture.spool import PAGE_SIZE, Spool
from kvmtrace.capture.tracefs import find_tracefs, mounted
from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.formats import open_recording
from kvmtrace.kvm.tracepoints import EVENT_SETS
from tests.capture.record_twice import ftrace_runs, wait_until

pytestmark = pytest.mark.kvm
KVMTRACE = [sys.executable, "-m", "kvmtrace"]


def metadata(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    assert data.endswith(META_MAGIC)
    length = struct.unpack("<Q", data[-24:-16])[0]
    value = json.loads(data[-24 - length : -24])
    assert isinstance(value, dict)
    return value


def leftovers(pid: int) -> list[str]:
    """Return what a recorder process left in tracefs and in the registry."""
    tracefs = mounted()
    assert tracefs is not None
    found = [p.name for p in (tracefs / "instances").iterdir() if p.name.startswith(f"kvmtrace-{pid}-")]
    found += [p.name for p in RUN_DIR.glob(f"{pid}-*")]
    for control in ("kprobe_events", "uprobe_events"):
        if (tracefs / control).exists():
            found += [line for line in (tracefs / control).read_text().splitlines() if f"kvmtrace_{pid}_" in line]
    return found


def record(output: Path, target: TargetSpec, **more: Any) -> RecordResult:
    result = ftrace.record(RecordSettings(output=output, target=target, **more))
    assert leftovers(os.getpid()) == []
    assert [p.name for p in output.parent.iterdir() if "kvmtrace-" in p.name] == []
    return result


def used(page: bytes) -> int:
    """Return where the events of a page end."""
    return 16 + (struct.unpack_from("<Q", page, 8)[0] & COMMIT_MASK)


def command(*argv: str) -> TargetSpec:
    return TargetSpec("command", command=argv)


def trace_cmd_lines(path: Path) -> list[str]:
    done = subprocess.run(["trace-cmd", "report", "-i", path], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if re.search(r" \[\d+\] +\d+\.\d+: ", line)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordResult:
    return record(tmp_path_factory.mktemp("guest") / "run.dat", TargetSpec("guest", guest="lifecycle"))


class TestGuest:
    def test_counts_are_what_the_guest_did(self, recorded: RecordResult) -> None:
        run = recorded.meta["guest_run"]
        table = open_recording(recorded.path).events()
        for name, count in run["known"]["tracepoints"].items():
            assert table.count(name) == count, name
        assert recorded.ended_by == "target"
        assert recorded.target_status == 0

    def test_trace_cmd_sees_the_same_events(self, recorded: RecordResult) -> None:
        lines = trace_cmd_lines(recorded.path)
        assert len(lines) == recorded.n_events == len(open_recording(recorded.path).events())
        names = [line.split(": ")[1].rstrip(":").split(":")[0] for line in lines]
        assert names.count("kvm_userspace_exit") == open_recording(recorded.path).events().count("kvm_userspace_exit")

    def test_metadata(self, recorded: RecordResult) -> None:
        meta = metadata(recorded.path)
        assert meta == recorded.meta
        assert meta["schema"] == "kvmtrace.capture/1"
        assert meta["target"]["kind"] == "guest"
        assert meta["target"]["pids"] == [meta["guest_run"]["pid"]]
        assert meta["clock"] == "mono"
        assert set(meta["events"]).isdisjoint(meta["missing_events"])
        assert "kvm:kvm_userspace_exit" in meta["events"]
        assert meta["loss"] == {"by_cpu": {}, "events": 0}
        assert meta["duration_ns"] > 0
        assert 1 < meta["cost_ns_per_event"] < 5000

    def test_vcpu_thread_is_named(self, recorded: RecordResult) -> None:
        tid = recorded.meta["guest_run"]["vcpu_tids"]["0"]
        pid, comm = recorded.meta["threads"][str(tid)]
        assert comm == "CPU 0/KVM"
        assert pid == recorded.meta["guest_run"]["pid"]

    def test_only_the_target_is_recorded(self, recorded: RecordResult) -> None:
        table = open_recording(recorded.path).events()
        run = recorded.meta["guest_run"]
        ours = {run["pid"], *run["vcpu_tids"].values()}
        ioctls = table.rows("sys_enter_ioctl")
        assert set(table.tid[ioctls].tolist()) <= ours


def test_perf_counts_the_same_events(tmp_path: Path) -> None:
    output = tmp_path / "run.dat"
    perf = ["perf", "record", "-q", "-e", "kvm:*", "-a", "-m", "8M", "-o", str(tmp_path / "perf.data"), "--"]
    argv = [*KVMTRACE, "record", "--backend", "ftrace", "-o", str(output), "--guest", "lifecycle"]
    subprocess.run([*perf, *argv], check=True, capture_output=True, timeout=300)
    script = subprocess.run(
        ["perf", "script", "-i", str(tmp_path / "perf.data"), "-F", "tid,event"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    meta = metadata(output)
    table = open_recording(output).events()
    tids = {str(tid) for tid in meta["guest_run"]["vcpu_tids"].values()} | {str(meta["guest_run"]["pid"])}
    seen: dict[str, int] = {}
    for line in script.splitlines():
        tid, event = line.split()[:2]
        if tid in tids and f"{event.rstrip(':')}" in meta["events"]:
            name = event.rstrip(":").partition(":")[2]
            seen[name] = seen.get(name, 0) + 1
    assert seen["kvm_userspace_exit"] > 50
    for name, count in seen.items():
        rows = table.rows(name)
        ours = sum(str(tid) in tids for tid in table.tid[rows].tolist())
        assert ours == count, name


def test_threads_that_start_later_are_recorded(tmp_path: Path) -> None:
    code = (
        "import threading, os, fcntl, sys\n"
        "def f():\n"
        "    fd = os.open('/dev/kvm', os.O_RDWR); fcntl.ioctl(fd, 0xae00); os.close(fd)\n"
        "sys.stdin.readline()\n"
        "for _ in range(5): t = threading.Thread(target=f); t.start(); t.join()\n"
        "if os.fork() == 0:\n"
        "    f(); os._exit(0)\n"
        "os.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:

        def release() -> None:
            wait_until(lambda: ftrace_runs(os.getpid()))
            child.communicate(b"go\n")

        starter = threading.Thread(target=release)
        starter.start()
        result = record(tmp_path / "late.dat", TargetSpec("pid", pid=child.pid))
        starter.join()
    table = open_recording(result.path).events()
    versions = table.field("sys_enter_ioctl", "cmd") == 0xAE00
    assert versions.sum() == 6
    assert len(set(table.tid[table.rows("sys_enter_ioctl")[versions]].tolist())) == 6


def test_exec_is_followed(tmp_path: Path) -> None:
    result = record(tmp_path / "exec.dat", command("sh", "-c", "exec sh -c 'exec sleep 0.05'"))
    table = open_recording(result.path).events()
    assert table.count("task_rename") >= 3


def test_whole_machine(tmp_path: Path) -> None:
    result = record(tmp_path / "all.dat", TargetSpec("all"), duration_s=0.3)
    assert result.ended_by == "time"
    assert result.n_events
    assert 0.3e9 <= result.meta["duration_ns"] < 2e9
    assert "syscalls:sys_enter_openat" in result.meta["filters"]


def test_event_sets(tmp_path: Path) -> None:
    minimal = record(tmp_path / "m.dat", command("true"), event_set="minimal")
    assert minimal.meta["events"] == ["kvm:kvm_entry", "kvm:kvm_exit", "kvm:kvm_userspace_exit"]
    everything = record(tmp_path / "a.dat", command("true"), event_set="all")
    assert len([name for name in everything.meta["events"] if name.startswith("kvm:")]) > 60


def test_clock(tmp_path: Path) -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    result = record(tmp_path / "c.dat", command("true"), clock="boot")
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    ts = open_recording(result.path).events().ts_ns
    assert before < ts.min() <= ts.max() < after
    with pytest.raises(CapabilityError, match="no trace clock nonsense"):
        record(tmp_path / "n.dat", command("true"), clock="nonsense")


def test_failed_start_leaves_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x7fELF nonsense")
    bad.chmod(0o755)
    with pytest.raises(UsageError):
        record(tmp_path / "x.dat", command(str(bad)))
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]
    assert leftovers(os.getpid()) == []


def test_small_buffers_recorded_plus_lost_is_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 KiB of buffer and a reader that looks rarely: most of the storm is overwritten
    monkeypatch.setattr(ftrace, "PACE_S", 0.2)
    monkeypatch.setitem(EVENT_SETS, "minimal", ("kvm:kvm_cpuid",))
    count = 20_000
    result = record(
        tmp_path / "s.dat",
        TargetSpec("guest", guest="storm", guest_arguments=("--count", str(count))),
        event_set="minimal",
        buffer_bytes=16 << 10,
    )
    true = result.meta["guest_run"]["known"]["tracepoints"]["kvm_cpuid"]
    recording = open_recording(result.path)
    table = recording.events()
    assert result.lost is not None
    assert result.lost > count / 4
    assert result.n_events == table.count("kvm_cpuid")
    assert result.n_events + result.lost == true
    assert recording.loss.events == result.lost


def test_default_buffers_lose_nothing_in_a_storm(tmp_path: Path) -> None:
    result = record(tmp_path / "s.dat", TargetSpec("guest", guest="storm", guest_arguments=("--count", "100000")))
    assert result.lost == 0
    known = result.meta["guest_run"]["known"]["tracepoints"]
    table = open_recording(result.path).events()
    assert {name: table.count(name) for name in known} == known


class TestReader:
    """The reader alone, on an instance into which the test writes markers."""

    @pytest.fixture
    def instance(self) -> Any:
        instance = Instance(find_tracefs(), f"kvmtrace-{os.getpid()}-{os.urandom(4).hex()}")
        instance.create()
        instance.set_buffer(1 << 20)
        instance.write("tracing_on", "1")
        yield instance
        instance.remove()

    @staticmethod
    def write_markers(instance: Instance, first: int, count: int) -> None:
        with (instance.path / "trace_marker").open("wb", buffering=0) as marker:
            for number in range(first, first + count):
                marker.write(b"%06d" % number + b"." * 200)

    @pytest.mark.parametrize("hop", [1, 3, 40])
    def test_limit_keeps_the_newest_of_all_cpus_and_counts_the_rest(
        self, instance: Instance, tmp_path: Path, hop: int
    ) -> None:
        spool = Spool.create(tmp_path / "r.dat")
        reader = Reader(instance, spool, max_bytes=2 << 20)
        cpus = sorted(os.sched_getaffinity(0))
        try:
            for batch in range(40):
                os.sched_setaffinity(0, {cpus[batch // hop % len(cpus)]})
                self.write_markers(instance, batch * 500, 500)
                reader.drain()
                kept = sum(spool.size_of(name) for names in spool.segments().values() for name in names)
                assert kept <= 2 << 20
            instance.write("tracing_on", "0")
            reader.finish()
            from_ns = trim_head(reader)
            skips = spool.manifest["skips"]
            files = [
                spool.read_file(name)[skips.get(name, 0) :] for names in spool.segments().values() for name in names
            ]
        finally:
            os.sched_setaffinity(0, cpus)
            reader.close()
            spool.discard()
        pages = [data[at : at + PAGE_SIZE] for data in files for at in range(0, len(data), PAGE_SIZE)]
        numbers = sorted(int(n) for page in pages for n in re.findall(rb"(\d{6})\.{190}", page[: used(page)]))
        discarded = sum(reader.discarded.values())
        assert numbers == list(range(discarded, 20_000))  # a gapless tail of what was written
        assert sum(map(count_events, pages)) == len(numbers)
        assert len(numbers) * 220 > 1 << 20  # at least half of the limit is used
        assert from_ns is not None
        assert all(now >= from_ns for page in pages for _, now in iter_events(page))


class TestKilled:
    """kill -9 at any moment: the next command finishes the file and cleans up."""

    @staticmethod
    def trial(directory: Path, delay_s: float | None) -> tuple[int, Path]:
        """Kill a recorder after `delay_s`, or (None) once it records; return its pid and its output."""
        output = directory / "killed.dat"
        argv = [
            *KVMTRACE,
            "record",
            "--force",
            "--backend",
            "ftrace",
            "-o",
            str(output),
            "--guest",
            "storm",
            "--count",
            "100000000",
        ]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as recorder:
            if delay_s is None:
                wait_until(lambda: ftrace_runs(recorder.pid), recorder)
            else:
                time.sleep(delay_s)
            recorder.send_signal(signal.SIGKILL)
        return recorder.pid, output

    @staticmethod
    def settle(pid: int, directory: Path) -> None:
        """Run the next command; another test's may have been first, and may not be through yet."""
        until = time.monotonic() + 600
        while time.monotonic() < until:
            subprocess.run([*KVMTRACE, "doctor"], check=True, capture_output=True, timeout=300)
            if not leftovers(pid) and not any("kvmtrace-" in p.name for p in directory.iterdir()):
                return
            time.sleep(0.1)
        pytest.fail(f"left behind: {leftovers(pid)} {list(directory.iterdir())}")

    def check(self, directory: Path, delay_s: float | None) -> bool:
        """Make one trial; return whether there was something to keep."""
        pid, output = self.trial(directory, delay_s)
        self.settle(pid, directory)
        if not output.exists():
            return False
        meta = metadata(output)
        table = open_recording(output).events()
        assert meta["ended_by"] in ("killed", "interrupt", "target")
        assert meta["n_events"] is None or meta["n_events"] == len(table) - table.count("lost_events")
        output.unlink()
        return True

    @pytest.mark.parametrize("delay_s", [0.15, 0.35, 0.6, None])
    def test_killed_recorder(self, tmp_path: Path, delay_s: float | None) -> None:
        kept = self.check(tmp_path, delay_s)
        assert kept or delay_s is not None

    @pytest.mark.slow
    def test_killed_at_random_moments(self, tmp_path: Path) -> None:
        trials = int(os.environ.get("KVMTRACE_TRIALS", "100"))
        kept = [self.check(tmp_path, 0.05 + 0.9 * (i * 0.618 % 1)) for i in range(trials)]
        print(f"{trials} trials, {sum(kept)} with something to keep")
        assert any(kept)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_ends_cleanly(self, tmp_path: Path, number: int) -> None:
        output = tmp_path / "s.dat"
        argv = [*KVMTRACE, "record", "--backend", "ftrace", "-o", str(output), "-a"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as recorder:
            wait_until(lambda: ftrace_runs(recorder.pid), recorder)
            recorder.send_signal(number)
            errors = recorder.communicate(timeout=300)[1]
        assert recorder.returncode == 0, errors
        assert metadata(output)["ended_by"] == "interrupt"
        assert len(open_recording(output).events()) == metadata(output)["n_events"]
        assert leftovers(recorder.pid) == []

    def test_ctrl_c_on_a_terminal_reaches_guest_and_recorder(self, tmp_path: Path) -> None:
        output = tmp_path / "c.dat"
        argv = [*KVMTRACE, "record", "--backend", "ftrace", "-o", str(output), "--guest", "storm", "--count", "9999999"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True) as recorder:
            wait_until(lambda: ftrace_runs(recorder.pid), recorder)
            os.killpg(recorder.pid, signal.SIGINT)
            errors = recorder.communicate(timeout=300)[1]
        assert recorder.returncode == 0
        assert "Traceback" not in errors
        assert metadata(output)["ended_by"] == "interrupt"
        assert metadata(output)["target_status"] == -signal.SIGTERM

    def test_target_dies(self, tmp_path: Path) -> None:
        with subprocess.Popen(["sleep", "600"]) as child:
            output = tmp_path / "t.dat"
            argv = [*KVMTRACE, "record", "--backend", "ftrace", "-o", str(output), "-p", str(child.pid)]
            with subprocess.Popen(argv, stderr=subprocess.PIPE) as recorder:
                wait_until(lambda: ftrace_runs(recorder.pid), recorder)
                child.kill()
                recorder.communicate(timeout=300)
        assert recorder.returncode == 0
        assert metadata(output)["ended_by"] == "target"
        assert leftovers(recorder.pid) == []

    def test_two_recorders_at_once(self, tmp_path: Path) -> None:
        def start(name: str) -> subprocess.Popen[bytes]:
            argv = [*KVMTRACE, "record", "--backend", "ftrace", "-o", str(tmp_path / name), "--guest", "lifecycle"]
            return subprocess.Popen(argv, stderr=subprocess.DEVNULL)

        recorders = [start("a.dat"), start("b.dat")]
        assert [r.wait(timeout=300) for r in recorders] == [0, 0]
        for recorder, name in zip(recorders, ("a.dat", "b.dat"), strict=True):
            run = metadata(tmp_path / name)["guest_run"]
            table = open_recording(tmp_path / name).events()
            assert all(table.count(n) == c for n, c in run["known"]["tracepoints"].items())
            assert leftovers(recorder.pid) == []


class TestPlaces:
    """Odd surroundings, made with private mounts."""

    @staticmethod
    def run_in_namespace(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False
        )

    def test_full_disk(self, tmp_path: Path) -> None:
        kvmtrace = " ".join(KVMTRACE)
        done = self.run_in_namespace(
            f"mount -t tmpfs -o size=6m none {tmp_path} && cd {tmp_path} && "
            # one CPU: which of two fills the disk first would be chance, and the other could end at once
            f"taskset -c 0 {kvmtrace} record --backend ftrace -o full.dat --guest storm --count 3000000; echo code $?; "
            f"{kvmtrace} record --backend ftrace -o second.dat -- true; ls -A; trace-cmd report full.dat | wc -l; "
            f"cp full.dat /var/tmp/{tmp_path.name}.dat"
        )
        assert "code 0" in done.stdout, done
        assert "ended early: disk full" in done.stderr
        saved = Path(f"/var/tmp/{tmp_path.name}.dat")
        try:
            meta = metadata(saved)
            table = open_recording(saved).events()
        finally:
            saved.unlink()
        assert meta["n_events"] == len(table) - table.count("lost_events") > 10_000
        assert meta["loss"]["events"] > 0
        assert table.ts_ns.max() < meta["complete_until_ns"]

    def test_tracefs_not_mounted(self, tmp_path: Path) -> None:
        kvmtrace = " ".join(KVMTRACE)
        done = self.run_in_namespace(
            f"umount -l {mounted()} && {kvmtrace} record --backend ftrace -o {tmp_path}/m.dat -- true"
        )
        assert done.returncode == 0, done
        assert metadata(tmp_path / "m.dat")["n_events"] > 0

    def test_read_only_tracefs(self, tmp_path: Path) -> None:
        kvmtrace = " ".join(KVMTRACE)
        done = self.run_in_namespace(
            f"mount -o remount,ro,bind {mounted()} && {kvmtrace} record --backend ftrace -o {tmp_path}/m.dat -- true"
        )
        assert done.returncode == 4, done
        assert "read-write" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_read_only_output(self, tmp_path: Path) -> None:
        kvmtrace = " ".join(KVMTRACE)
        done = self.run_in_namespace(
            f"mount -t tmpfs -o ro none {tmp_path}; {kvmtrace} record --backend ftrace -o {tmp_path}/m.dat -- true"
        )
        assert done.returncode == 4, done
        assert "Read-only file system" in done.stderr
        assert done.stderr.count("\n") == 1
