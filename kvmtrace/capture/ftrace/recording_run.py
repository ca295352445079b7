"""What one ftrace recording owns in the system, and how it becomes a file (also after its recorder died)."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.capture.ftrace.assemble import assemble, seal
from kvmtrace.capture.ftrace.event_cost import cost_ns_per_event
from kvmtrace.capture.ftrace.instance import INSTANCE_PREFIX, Instance
from kvmtrace.capture.ftrace.overwritten import without_overruns
from kvmtrace.capture.ftrace.probe_events import GROUP_PREFIX, Probes
from kvmtrace.capture.ftrace.raw_pages import event_ids
from kvmtrace.capture.ftrace.trace_dat_writer import Tail
from kvmtrace.capture.ftrace.trim import trim_head, trim_tail
from kvmtrace.capture.nothing_of_kvm import is_of_kvm
from kvmtrace.capture.spool import Spool
from kvmtrace.kvm.tracepoints import PROBE_SYSTEM
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.capture.ftrace.page_mover import Reader
    from kvmtrace.capture.threads import Threads

SCAN_BYTES = 32 << 20  # looked at for an event of KVM; as a rule the first page has one


@dataclass
class Run:
    """Instance, probes and spool of one recording, all named PID-TOKEN; they go with `remove`."""

    instance: Instance
    probes: Probes
    spool: Spool
    reader: Reader | None = None

    @classmethod
    def create(cls, tracefs: Path, output: Path) -> Run:
        """Make spool and instance, in the order in which they can be found again."""
        token = secrets.token_hex(4)
        name = f"{os.getpid()}-{token}"
        spool = Spool.create(output, token)
        instance = Instance(tracefs, INSTANCE_PREFIX + name)
        probes = Probes(tracefs, GROUP_PREFIX + name.replace("-", "_"))
        run = cls(instance, probes, spool)
        try:
            instance.create()
        except BaseException:
            run.remove()
            raise
        return run

    def seal(self, threads: Threads, meta: dict[str, Any], *, measure: bool = True, overwritten: bool = False) -> None:
        """End the tracing and note in the spool all that the file needs.

        Parameters
        ----------
        threads, meta : as `complete` left them
        measure : bool, find out what an event cost; not when a dead recorder's work is finished
        overwritten : bool, the buffers overwrote their oldest events on purpose
        """
        instance, reader = self.instance, self.reader
        assert reader is not None
        threads.add_saved(instance.tracefs)
        meta["threads"] = threads.as_meta()
        now = threads.vms.as_meta()
        meta["vms"] = now + [vm for vm in meta.get("vms", []) if vm.get("pid") not in {one["pid"] for one in now}]
        stats = {cpu: instance.read(f"per_cpu/cpu{cpu}/stats") for cpu in reader.cpus}
        tail = Tail(
            threads.comms(),
            {cpu: without_overruns(text) for cpu, text in stats.items()} if overwritten else stats,
            instance.read("trace_clock"),
            f"kvmtrace {__version__}",
        )
        if measure:
            meta["cost_ns_per_event"] = cost_ns_per_event(instance)
        self.remove_tracing()
        seal(self.spool, tail, meta)

    def remove_tracing(self) -> None:
        """Leave tracefs as it was."""
        if self.reader is not None:
            self.reader.close()
            self.reader = None
        self.instance.remove()
        self.probes.remove()

    def remove(self) -> None:
        """Leave nothing behind."""
        self.remove_tracing()
        self.spool.discard()

    def leave_spool(self) -> None:
        """Leave the spool, to be finished by a later command."""
        self.remove_tracing()
        self.spool.close()

    def publish(self, destination: str) -> Path:
        """Turn the sealed spool into the file and remove everything else.

        Raises
        ------
        OSError
            The disk is full or broken; the spool is still there.
        """
        path = assemble(self.spool, destination)
        self.remove()
        return path


def kvm_seen(run: Run, meta: dict[str, Any]) -> bool | None:
    """Say whether the spool holds an event of KVM; None if that would take long to find out."""
    ids = set()
    for event in meta["events"]:
        system, _, name = event.partition(":")
        if is_of_kvm(system, name):
            with contextlib.suppress(OSError):
                ids.add(run.instance.event_id(run.probes.group if system == PROBE_SYSTEM else system, name))
    left = SCAN_BYTES
    for names in run.spool.segments().values():
        for name in names:
            for page in run.spool.pages(name):
                if not ids.isdisjoint(event_ids(page)):
                    return True
                left -= len(page)
                if left <= 0:
                    return None
    return False


def complete(run: Run, reader: Reader, meta: dict[str, Any], in_flight: dict[int, int | None] | None = None) -> None:
    """Add to `meta` what the kernel and the reader counted.

    Parameters
    ----------
    run, meta
    reader : Reader that has finished
    in_flight : CPU -> events lost between kernel and spool when the recorder was killed, None if unknown
    """
    instance = run.instance
    complete_from_ns = trim_head(reader)
    complete_until_ns = trim_tail(reader)
    stats = {cpu: instance.stats(cpu) for cpu in reader.cpus}
    left = {cpu: counters.get("entries", 0) for cpu, counters in stats.items()}
    flying = in_flight or {}
    known = None not in flying.values()
    lost = {
        cpu: instance.lost(cpu) + left[cpu] + reader.dropped.get(cpu, 0) + (flying.get(cpu) or 0) for cpu in reader.cpus
    }
    meta["kvm_seen"] = kvm_seen(run, meta)
    read = sum(counters.get("read events", 0) for counters in stats.values())
    gone = sum(reader.dropped.values()) + sum(reader.discarded.values()) + sum(filter(None, flying.values()))
    meta["loss"] = {
        "by_cpu": {str(cpu): count for cpu, count in lost.items() if count},
        "events": sum(lost.values()) if known else None,
    }
    meta["n_events"] = read - gone if known else None
    not_kept = sum(left.values()) + sum(reader.dropped.values())
    if not_kept:
        meta["notes"].append(f"{not_kept} events at the end were lost because the disk was full")
        meta["complete_until_ns"] = complete_until_ns
    if missed := run.probes.missed():
        meta["notes"].append(f"{missed} hits of probes were missed by the kernel")
    if reader.discarded:
        meta["discarded"] = {
            "by_cpu": {str(cpu): count for cpu, count in reader.discarded.items()},
            "events": sum(reader.discarded.values()),
        }
        meta["complete_from_ns"] = complete_from_ns
