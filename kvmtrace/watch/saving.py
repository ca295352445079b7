"""From a ring that stands still to an ordinary recording: the last seconds of it, with the trigger in its metadata."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.capture.ftrace.assemble import assemble, seal
from kvmtrace.capture.ftrace.disk_full import finish_full
from kvmtrace.capture.ftrace.overwritten import keep_from, without_overruns
from kvmtrace.capture.ftrace.page_mover import DiskFullError, Reader
from kvmtrace.capture.ftrace.trace_dat_writer import Tail
from kvmtrace.capture.ftrace.trim import trim_tail
from kvmtrace.capture.spool import Spool
from kvmtrace.capture.threads import Threads
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.watch.rings import Ring, Rings
    from kvmtrace.watch.triggers import Fired


@dataclass(frozen=True)
class Wanted:
    """What is to be saved.

    Parameters
    ----------
    fired : the triggers, the first one first
    keep_ns : how much of the time before the first trigger is promised
    suppressed : how many triggers were passed over since the last recording
    vms : metadata rows of the VMs
    whole : save all there is; nothing was promised
    before : name of the recording that ends where this one begins, None if there is none
    """

    fired: tuple[Fired, ...]
    keep_ns: int
    suppressed: int
    vms: list[dict[str, Any]]
    whole: bool = False
    before: str | None = None


def save(rings: Rings, ring: Ring, output: Path, wanted: Wanted) -> tuple[Path, dict[str, Any]]:
    """Make a recording of a ring that stands still; if we are killed, the next kvmtrace command does.

    Returns
    -------
    Path of the recording, and its metadata

    Raises
    ------
    CapabilityError, OSError
        There is no place for it.
    """
    spool = Spool.create(output, ring.token)
    reader: Reader | None = None
    try:
        meta = _first_meta(rings, ring, wanted)
        spool.write_file("head", rings.head)
        spool.save({"state": "recording", "meta": meta})
        reader = Reader(ring.instance, spool)
        meta |= _read(reader, meta["complete_from_ns"])
        threads = Threads(rings.target.pid)
        threads.look(force=True)
        threads.add_saved(rings.tracefs)
        now = threads.vms.as_meta()
        meta["threads"] = threads.as_meta()
        meta["vms"] = wanted.vms + [vm for vm in now if vm["pid"] not in {one["pid"] for one in wanted.vms}]
        stats = {cpu: without_overruns(ring.instance.read(f"per_cpu/cpu{cpu}/stats")) for cpu in reader.cpus}
        tail = Tail(threads.comms(), stats, ring.instance.read("trace_clock"), f"kvmtrace {__version__}")
        reader.close()
        reader = None
        seal(spool, tail, meta)
        path = assemble(spool, output.name)
    finally:
        if reader is not None:
            reader.close()
        spool.discard()
    return path, meta


def _first_meta(rings: Rings, ring: Ring, wanted: Wanted) -> dict[str, Any]:
    """Return the metadata as far as they are known before anything is read."""
    first = wanted.fired[0]
    promised = first.ts_ns - wanted.keep_ns
    begin = ring.oldest_ns() if wanted.whole else max(promised, ring.oldest_ns())
    notes = list(rings.meta["notes"])
    if not wanted.whole and begin > promised + 10**9:
        short = (first.ts_ns - begin) / 1e9
        began = begin == ring.began_ns
        why = "the recorder had just begun, or just saved" if began else "a larger --buffer-size keeps more"
        if wanted.before is not None:
            why = f"what was before is in {wanted.before}"
        notes.append(f"{short:.1f} s before the trigger were kept instead of {wanted.keep_ns / 1e9:g} s: {why}")
    if wanted.suppressed:
        notes.append(f"{wanted.suppressed} triggers before this one were passed over: --at-most")
    return rings.meta | {
        "started": datetime.now(UTC).isoformat(),
        "notes": notes,
        "triggers": [one.as_meta() for one in wanted.fired],
        "ended_by": "trigger",
        "complete_from_ns": begin,
        "vms": wanted.vms,
        "kvm_seen": None,
    }


def _read(reader: Reader, from_ns: int) -> dict[str, Any]:
    """Move everything to the spool, cut what is older; return what is to be said of it."""
    found: dict[str, Any] = {}
    try:
        reader.finish()
    except DiskFullError:
        finish_full(reader)
        found = {"ended_by": "disk full", "complete_until_ns": trim_tail(reader)}
    return found | keep_from(reader, from_ns)


def with_vm(fired: Fired, vms: list[dict[str, Any]]) -> Fired:
    """Return a trigger with the name of the VM it is about."""
    names = {vm["pid"]: vm["name"] for vm in vms if vm["name"]}
    return fired if fired.vm or fired.pid is None else replace(fired, vm=names.get(fired.pid))
