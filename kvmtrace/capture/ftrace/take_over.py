"""What a dead recorder left in tracefs: its instance is read to the end, then all is removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.capture.ftrace.assemble import seal
from kvmtrace.capture.ftrace.disk_full import finish_full
from kvmtrace.capture.ftrace.instance import INSTANCE_PREFIX, Instance
from kvmtrace.capture.ftrace.overwritten import ALL_READ, keep_from
from kvmtrace.capture.ftrace.page_mover import DiskFullError, Reader
from kvmtrace.capture.ftrace.probe_events import GROUP_PREFIX, Probes
from kvmtrace.capture.ftrace.raw_pages import count_events
from kvmtrace.capture.ftrace.recording_run import Run, complete
from kvmtrace.capture.ftrace.trace_dat_writer import Tail
from kvmtrace.capture.recorders import registered
from kvmtrace.capture.threads import Threads
from kvmtrace.capture.tracefs import mounted

if TYPE_CHECKING:
    from kvmtrace.capture.spool import Spool

# up to here the spool's events are counted, to know exactly what was in flight when the recorder died
COUNT_LIMIT_BYTES = 64 << 20
KILLED = "the recorder was killed; a later command finished the file"


def take_over(name: str, spool: Spool) -> None:
    """Read what a dead recorder had not, and seal its spool; does nothing if its instance is gone.

    Parameters
    ----------
    name : str, PID-TOKEN of the recorder
    spool : Spool, adopted
    """
    tracefs = mounted()
    if tracefs is None or spool.manifest.get("state") != "recording":
        return
    instance = Instance(tracefs, INSTANCE_PREFIX + name)
    if not instance.path.is_dir():
        return
    run = Run(instance, Probes(tracefs, GROUP_PREFIX + name.replace("-", "_")), spool)
    try:
        _read_to_the_end(run)
    finally:
        if run.reader is not None:
            run.reader.close()
        instance.unlock()


def _read_to_the_end(run: Run) -> None:
    run.instance.lock()
    run.instance.write("tracing_on", "0")
    run.reader = reader = Reader(run.instance, run.spool)
    meta = run.spool.manifest["meta"] | {"ended_by": "killed"}
    meta["notes"] = [*meta["notes"], KILLED]
    in_flight = {} if run.spool.manifest.get(ALL_READ) else _count_in_flight(reader)
    pids = meta["target"]["pids"]
    threads = Threads(pids[0] if pids else None)
    threads.look()
    try:
        reader.finish(after_gap={cpu for cpu, count in in_flight.items() if count != 0})
    except DiskFullError:
        meta["notes"].append("the disk is full")
        finish_full(reader)
    overwritten = bool(meta.get("triggers"))  # the flight recorder's buffers go round
    if overwritten:
        meta |= keep_from(reader, meta["complete_from_ns"], in_flight)
    else:
        complete(run, reader, meta, in_flight)
    run.seal(threads, meta, measure=False, overwritten=overwritten)


def _count_in_flight(reader: Reader) -> dict[int, int | None]:
    """Return, per CPU, how many events the kernel had handed over that are not in the spool; None: unknown."""
    sizes = {cpu: sum(segment.size for segment in parts) for cpu, parts in reader.segments.items()}
    if sum(sizes.values()) > COUNT_LIMIT_BYTES:
        return dict.fromkeys(reader.cpus, None)
    missing: dict[int, int | None] = {}
    for cpu, parts in reader.segments.items():
        stored = sum(count_events(page) for segment in parts for page in reader.spool.pages(segment.name))
        read = reader.instance.stats(cpu).get("read events", 0)
        missing[cpu] = read - reader.discarded.get(cpu, 0) - stored
    return missing


def seal_without_instance(spool: Spool) -> None:
    """Seal the spool of a recorder whose instance is gone, after a reboot for example."""
    meta = spool.manifest["meta"] | {"ended_by": "killed"}
    meta["notes"] = [*meta["notes"], KILLED, "what the kernel still held is lost"]
    seal(spool, Tail({}, {}, f"[{meta['clock']}]", f"kvmtrace {meta['kvmtrace']}"), meta)


def free_tracing(name: str) -> None:
    """Remove the instance and the probes of a dead recorder; does nothing if they are gone."""
    tracefs = mounted()
    if tracefs is not None:
        Instance(tracefs, INSTANCE_PREFIX + name).remove()
        Probes(tracefs, GROUP_PREFIX + name.replace("-", "_")).remove()


def remove_orphans() -> list[str]:
    """Remove instances and probe groups of ours whose process is gone and that nobody registered; say which."""
    tracefs = mounted()
    if os.geteuid() != 0 or tracefs is None:
        return []
    said = []
    known = registered()
    for path in (tracefs / "instances").glob(f"{INSTANCE_PREFIX}*-*"):
        owner = path.name.removeprefix(INSTANCE_PREFIX)
        if owner in known or _alive(owner.partition("-")[0]):
            continue
        instance = Instance(tracefs, path.name)
        if instance.lock():
            instance.remove()
            said.append(f"removed the trace instance {path.name} of a dead recorder")
    for group in Probes.groups(tracefs):
        owner = group.removeprefix(GROUP_PREFIX).replace("_", "-")
        if (tracefs / "instances" / f"{INSTANCE_PREFIX}{owner}").exists():
            continue  # its recorder lives, perhaps in a container: there its process id is another one
        if owner not in known and not _alive(owner.partition("-")[0]):
            Probes(tracefs, group).remove()
            said.append(f"removed the probes {group} of a dead recorder")
    return said


def _alive(pid: str) -> bool:
    return not pid.isdigit() or Path("/proc", pid).exists()
