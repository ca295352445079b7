"""Finishing what a killed recorder left: its file, its tracing instance, its probes.

`reclaim()` is called at the start of every command that records or reads; it costs a directory listing when
there is nothing to do. What the dead recorder had not read yet is read now: the instance went on recording.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.recorders import RUN_DIR, Registration, dead_recorders

if TYPE_CHECKING:
    from kvmtrace.capture.ftrace.recording_run import Run
    from kvmtrace.capture.spool import Spool

# up to here the spool's events are counted, to know exactly what was in flight when the recorder died
COUNT_LIMIT_BYTES = 64 << 20
KILLED = "the recorder was killed; a later command finished the file"


def reclaim(output: Path | None = None) -> list[str]:
    """Remove what dead recorders left in the kernel and turn their spools into files.

    Parameters
    ----------
    output : Path or None, also look beside this file for a spool that no entry tells of

    Returns
    -------
    list of str, one line for people per thing done or impossible
    """
    said = []
    for entry in dead_recorders():
        said += _attempt(entry)
    said += _remove_orphans()
    if output is not None:
        said += _reclaim_beside(output)
    return said


def _attempt(entry: Registration) -> list[str]:
    """Reclaim one registered recorder; the entry stays if that failed."""
    values = entry.read()
    try:
        said = _reclaim_entry(entry.path.stem, values)
    except OSError as error:
        entry.close()
        return [f"cannot finish the interrupted recording {values.get('output')}: {error.strerror or error}"]
    entry.remove()
    return said


def _reclaim_entry(name: str, values: dict[str, Any]) -> list[str]:
    from kvmtrace.capture.ftrace.instance import INSTANCE_PREFIX, Instance
    from kvmtrace.capture.ftrace.probe_events import GROUP_PREFIX, Probes
    from kvmtrace.capture.ftrace.recording_run import Run
    from kvmtrace.capture.spool import Spool
    from kvmtrace.capture.tracefs import mounted

    spool = Spool.adopt(Path(values["output"]), Path(values["spool"])) if values else None
    tracefs = mounted()
    if tracefs is not None:
        instance = Instance(tracefs, INSTANCE_PREFIX + name)
        probes = Probes(tracefs, GROUP_PREFIX + name.replace("-", "_"))
        if spool is not None:
            run = Run(instance, probes, spool)
            if spool.manifest.get("state") == "recording" and instance.path.is_dir():
                _take_over(run)
            run.remove_tracing()
        instance.remove()
        probes.remove()
    return [] if spool is None else finish_spool(spool)


def _take_over(run: Run) -> None:
    """Read what the dead recorder had not, and seal its spool."""
    from kvmtrace.capture.ftrace.disk_full import finish_full
    from kvmtrace.capture.ftrace.page_mover import DiskFullError, Reader
    from kvmtrace.capture.ftrace.recording_run import complete
    from kvmtrace.capture.threads import Threads

    run.instance.lock()
    run.instance.write("tracing_on", "0")
    run.reader = reader = Reader(run.instance, run.spool)
    meta = run.spool.manifest["meta"] | {"ended_by": "killed"}
    meta["notes"] = [*meta["notes"], KILLED]
    in_flight = _count_in_flight(reader)
    pids = meta["target"]["pids"]
    threads = Threads(pids[0] if pids else None)
    threads.look()
    try:
        reader.finish(after_gap={cpu for cpu, count in in_flight.items() if count != 0})
    except DiskFullError:
        meta["notes"].append("the disk is full")
        finish_full(reader)
    complete(run, reader, meta, in_flight)
    run.seal(threads, meta, measure=False)


def _count_in_flight(reader: Any) -> dict[int, int | None]:
    """Return, per CPU, how many events the kernel had handed over that are not in the spool; None: unknown."""
    from kvmtrace.capture.ftrace.raw_pages import count_events
    from kvmtrace.capture.spool import PAGE_SIZE

    sizes = {cpu: sum(segment.size for segment in parts) for cpu, parts in reader.segments.items()}
    if sum(sizes.values()) > COUNT_LIMIT_BYTES:
        return dict.fromkeys(reader.cpus, None)
    missing: dict[int, int | None] = {}
    for cpu, parts in reader.segments.items():
        stored = 0
        for segment in parts:
            data = reader.spool.read_file(segment.name)
            stored += sum(
                count_events(data[at : at + PAGE_SIZE]) for at in range(0, len(data) - PAGE_SIZE + 1, PAGE_SIZE)
            )
        read = reader.instance.stats(cpu).get("read events", 0)
        missing[cpu] = read - reader.discarded.get(cpu, 0) - stored
    return missing


def finish_spool(spool: Spool) -> list[str]:
    """Turn a spool into its file, or discard it if it holds nothing."""
    from kvmtrace.capture.ftrace.assemble import OUT, assemble, seal
    from kvmtrace.capture.ftrace.trace_dat_writer import Tail

    manifest = spool.manifest
    if manifest.get("state") == "recording":  # its instance is gone, after a reboot for example
        meta = manifest["meta"] | {"ended_by": "killed"}
        meta["notes"] = [*meta["notes"], KILLED, "what the kernel still held is lost"]
        seal(spool, Tail({}, {}, f"[{meta['clock']}]", f"kvmtrace {meta['kvmtrace']}"), meta)
    state = manifest.get("state")
    owner = tuple(manifest["owner"]) if manifest.get("owner") else None
    name = _free_name(spool)
    if state == "complete":  # a bpf capture is readable as it stands
        spool.publish(OUT, name, owner)
    elif state == "sealed":
        assemble(spool, name, owner)
    else:  # it never began
        spool.discard()
        return []
    path = spool.path.parent / name
    spool.discard()
    return [f"finished the recording of a killed recorder: {path}"]


def _free_name(spool: Spool) -> str:
    """Return the output's name, or a new one if somebody made a file of that name since."""
    name = spool.output.name
    try:
        there = os.stat(name, dir_fd=spool.parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        return name
    if there.st_mtime_ns < spool.manifest["created_ns"]:
        return name
    return f"{name}.recovered-{spool.path.name.rpartition('-')[2]}"


def _reclaim_beside(output: Path) -> list[str]:
    """Finish spools beside `output` whose recorder is dead and which no registry entry tells of."""
    from kvmtrace.capture.spool import Spool

    said = []
    try:
        found = sorted(output.parent.glob(f".{_escape(output.name)}.kvmtrace-*"))
    except OSError:
        return []
    for path in found:
        spool = Spool.adopt(output, path)
        if spool is None:
            said.append(_why_not(output, path))
            continue
        try:
            said += finish_spool(spool)
        except OSError as error:
            said.append(f"cannot finish the interrupted recording {output}: {error.strerror or error}")
        finally:
            spool.close()
    return [line for line in said if line]


def _why_not(output: Path, path: Path) -> str:
    """Say why a spool is left alone; "" if its recorder still lives or it is gone."""
    try:
        owner = path.lstat().st_uid
    except OSError:
        return ""
    if owner == os.geteuid():
        return ""
    return f"an interrupted recording waits beside {output}; finish it with: sudo kvmtrace doctor"


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _remove_orphans() -> list[str]:
    """Remove instances and probe groups of ours whose process is gone and that nobody registered."""
    from kvmtrace.capture.ftrace.instance import INSTANCE_PREFIX, Instance
    from kvmtrace.capture.ftrace.probe_events import GROUP_PREFIX, Probes
    from kvmtrace.capture.tracefs import mounted

    tracefs = mounted()
    if os.geteuid() != 0 or tracefs is None:
        return []
    said = []
    registered = {path.stem for path in RUN_DIR.glob("*.json")}
    for path in (tracefs / "instances").glob(f"{INSTANCE_PREFIX}*-*"):
        owner = path.name.removeprefix(INSTANCE_PREFIX)
        if owner in registered or _alive(owner.partition("-")[0]):
            continue
        instance = Instance(tracefs, path.name)
        if instance.lock():
            instance.remove()
            said.append(f"removed the trace instance {path.name} of a dead recorder")
    for group in Probes.groups(tracefs):
        owner = group.removeprefix(GROUP_PREFIX).replace("_", "-")
        if (tracefs / "instances" / f"{INSTANCE_PREFIX}{owner}").exists():
            continue  # its recorder lives, perhaps in a container: there its process id is another one
        if owner not in registered and not _alive(owner.partition("-")[0]):
            Probes(tracefs, group).remove()
            said.append(f"removed the probes {group} of a dead recorder")
    return said


def _alive(pid: str) -> bool:
    return not pid.isdigit() or Path("/proc", pid).exists()
