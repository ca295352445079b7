"""The ftrace back end: an own tracing instance, whose pages are moved to a trace.dat unread.

What it does not show: with a target, only what happens on the target's own threads is recorded. An
interrupt that arrives while another thread runs on that CPU, an irqfd served by a kernel worker, vhost, or
another process that wakes a vCPU, are seen by their effect on the vCPU only. `-a` records them.

The trace clock is "mono": ordered across CPUs (the default "local" is not), without the lock of "global",
and the clock of bpf_ktime_get_ns() and CLOCK_MONOTONIC, so that recordings of both back ends and a VMM's
own log can be laid side by side.
"""

from __future__ import annotations

import select
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.buffer_size import buffer_bytes, say_smaller
from kvmtrace.capture.ending import Ending
from kvmtrace.capture.first_metadata import first_metadata
from kvmtrace.capture.ftrace.disk_full import finish_full
from kvmtrace.capture.ftrace.event_plan import Plan, enable, plan_events
from kvmtrace.capture.ftrace.page_mover import DiskFullError, Reader
from kvmtrace.capture.ftrace.recording_run import Run, complete
from kvmtrace.capture.ftrace.trace_dat_writer import build_head
from kvmtrace.capture.nothing_of_kvm import say_nothing, vcpus_of
from kvmtrace.capture.qmp import QmpWitness
from kvmtrace.capture.settings import RecordResult, RecordSettings
from kvmtrace.capture.target import Target
from kvmtrace.capture.threads import Threads
from kvmtrace.capture.tracefs import find_tracefs

if TYPE_CHECKING:
    from kvmtrace.capture.ftrace.instance import Instance

DEFAULT_CLOCK = "mono"
WAKE_PERCENT = 25  # the reader sleeps until a buffer is that full
FLUSH_S = 1.0  # but looks at least so often
PACE_S = 0.01  # and never more often: kernels before 6.1 wake it for every event


def record(settings: RecordSettings) -> RecordResult:
    """Record with ftrace until the target or the time ends, a signal comes or the disk is full.

    Raises
    ------
    CapabilityError, UsageError
        Nothing was recorded, and why.
    """
    tracefs = find_tracefs()
    with Ending(settings.duration_s) as ending, Target(settings.target) as target:
        run = Run.create(tracefs, settings.output)
        try:
            meta, cpu_s = _record(settings, run, ending, target)
        except OSError as error:
            problem = run.spool.why_unpublished(error) if run.spool.gone() else error
            run.remove()
            raise problem from error
        except BaseException:
            run.remove()
            raise
        return _publish(settings, run, meta, cpu_s)


def _record(settings: RecordSettings, run: Run, ending: Ending, target: Target) -> tuple[dict[str, Any], float]:
    """Record into the spool and seal it; return the metadata and the CPU seconds that took."""
    plan = plan_events(run.instance, run.probes, settings)
    _set_up(settings, run.instance, target, plan)
    meta = _first_metadata(settings, run.instance, target, plan)
    threads = Threads(target.pid, run.instance.tracefs, settings.target.command)
    threads.look(force=True)
    meta["vms"] = threads.vms.as_meta()
    head = build_head(run.instance.path, run.instance.tracefs, plan.events, _kallsyms(plan))
    run.spool.write_file("head", head)
    run.spool.save({"state": "recording", "meta": meta})
    run.reader = reader = Reader(run.instance, run.spool, settings.max_bytes)
    cpu_before = time.process_time()
    run.instance.write("tracing_on", "1")
    started_ns = time.monotonic_ns()
    ending.start()
    target.release()
    witness = QmpWitness(settings.qmp)
    witness.start()
    ended_by = _pump(reader, ending, target, threads)
    run.instance.write("tracing_on", "0")
    meta["duration_ns"] = time.monotonic_ns() - started_ns
    threads.look(force=True)
    n_vcpus = vcpus_of(target.pid)
    target.close()
    meta["qmp"] = witness.finish()
    threads.vms.add_qmp(meta["qmp"])
    if problem := witness.problem():
        meta["notes"].append(problem)
    if ended_by != "disk full":
        ended_by = _finish(reader, ended_by)
    if ended_by == "disk full":
        finish_full(reader)
    cpu_s = time.process_time() - cpu_before
    meta |= {
        "guest_run": target.guest_run,
        "target_status": target.status,
        "ended_by": ended_by,
        "recorder_cpu_ns": int(cpu_s * 1e9),
    }
    complete(run, reader, meta)
    if meta["kvm_seen"] is False:
        meta["notes"].append(say_nothing(settings, meta, n_vcpus))
    run.seal(threads, meta)
    return meta, cpu_s


def _publish(settings: RecordSettings, run: Run, meta: dict[str, Any], cpu_s: float) -> RecordResult:
    """Make the file; where that fails, say where the recording waits."""
    try:
        path = run.publish(settings.output.name)
    except OSError as error:
        problem = run.spool.why_unpublished(error)
        run.leave_spool()
        raise problem from error
    return RecordResult(
        path=path, meta=meta, n_events=meta["n_events"], file_bytes=path.stat().st_size, recorder_cpu_s=cpu_s
    )


def _set_up(settings: RecordSettings, instance: Instance, target: Target, plan: Plan) -> None:
    """Configure the instance; it does not trace yet."""
    instance.set_clock(settings.clock or DEFAULT_CLOCK)
    instance.set_buffer(buffer_bytes(settings.buffer_bytes, len(instance.cpus())))
    instance.try_write("buffer_percent", str(WAKE_PERCENT))
    instance.try_write("options/record-tgid", "1")
    if settings.target.kind != "all":
        instance.write("options/event-fork", "1")
        tids = target.tids()
        while tids:
            instance.write("set_event_pid", " ".join(map(str, tids)))
            before, tids = tids, target.tids()
            if set(tids) <= set(before):  # no thread was started in between
                break
    enable(instance, plan)


def _first_metadata(settings: RecordSettings, instance: Instance, target: Target, plan: Plan) -> dict[str, Any]:
    """Return the metadata as far as it is known when the recording begins."""
    size = int(instance.read("buffer_size_kb").split()[0]) * 1024
    smaller = say_smaller(settings.buffer_bytes, size, len(instance.cpus()))
    return first_metadata(
        settings,
        target,
        backend="ftrace",
        clock=settings.clock or DEFAULT_CLOCK,
        events=plan.names(),
        missing_events=plan.missing,
        probes=plan.probes,
        filters=plan.filters,
        notes=[smaller] if smaller else [],
        buffer_bytes=size,
    )


def _kallsyms(plan: Plan) -> bytes:
    """Return the /proc/kallsyms lines of the probed functions, so that readers can name __probe_ip."""
    wanted = {row["function"].encode() for row in plan.probes}
    if not wanted:
        return b""
    with Path("/proc/kallsyms").open("rb") as file:
        return b"".join(line for line in file if line.split()[2] in wanted)


def _pump(reader: Reader, ending: Ending, target: Target, threads: Threads) -> str:
    """Move pages until the recording ends; return why it ended."""
    control = select.poll()
    for fd in (ending.fd, target.pidfd):
        if fd is not None:
            control.register(fd, select.POLLIN)
    everything = select.poll()
    for fd in (ending.fd, target.pidfd, *reader.raw.values()):
        if fd is not None:
            everything.register(fd, select.POLLIN)
    while True:
        ended_by = ending.reason(target)
        if ended_by is not None:
            return ended_by
        remaining = ending.remaining_s()
        everything.poll(1000 * (FLUSH_S if remaining is None else min(FLUSH_S, remaining)))
        try:
            reader.drain()
        except DiskFullError:
            return "disk full"
        threads.look()
        control.poll(1000 * PACE_S)


def _finish(reader: Reader, ended_by: str) -> str:
    """Read what is left in the buffers; return why the recording ended."""
    try:
        reader.finish()
    except DiskFullError:
        return "disk full"
    return ended_by
