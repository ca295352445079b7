"""`kvmtrace watch`: the flight recorder."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmtrace.capture.settings import RecordSettings, TargetSpec
from kvmtrace.cli.completion import processes
from kvmtrace.cli.output import check_folder
from kvmtrace.cli.parameter_types import MAX_PID, Duration, Size
from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.kvm.tracepoints import EVENT_SETS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.check.monitor_table import MonitorTable
    from kvmtrace.watch.triggers import Trigger

EPILOG = """\b
Examples:
  kvmtrace watch -a --keep 30s -o /var/lib/kvmtrace --on 'slower-than 10ms' --on 'run-delay 20ms'
  kvmtrace watch --vm web-3 -o . --on 'slo p99 MSR_WRITE > 1ms over 10s' --on 'signal USR1'

\b
Triggers, as many --on as wanted:
  slower-than TIME[:REASON]        an exit takes so long, without wait and preemption; decided at its end
  run-delay TIME                   a vCPU waits so long for a CPU, after a wake-up or a preemption
  rate REASON>N/s                  a VM's exits of that reason are so many (k, M; * is any)
  slo pNN REASON > TIME over TIME  a quantile of a VM's exits of that reason over a while
  signal USR1                      somebody sends it
  command 'CMD ARG...'             the command ends; it is started again
  monitor                          a vCPU takes a step that the model does not allow; decided in the kernel
  model                            what was recorded breaks any rule of the model; each --keep is checked on the disk

Events go round in the kernel's buffers: no disk, bounded memory. When a trigger fires, the last --keep and a --tail
after it become an ordinary recording, named by time and VM, with the trigger in it; `kvmtrace report` tells it first. A
second instance records meanwhile. SIGHUP looks at VMs again. Ending it leaves nothing but recordings.
"""


@click.command("watch", epilog=EPILOG)
@click.option("-a", "--all", "machine", is_flag=True, help="Watch the whole machine.")
@click.option("-p", "--pid", type=click.IntRange(1, MAX_PID), shell_complete=processes, help="Watch a process.")
@click.option("--vm", metavar="NAME|UUID", help="Watch the running VM of this name or uuid; may be a pattern.")
@click.option(
    "--on", "triggers", multiple=True, required=True, metavar="TRIGGER", help="What makes it save; see below."
)
@click.option(
    "--keep",
    type=Duration(),
    default="30",
    show_default=True,
    metavar="TIME",
    help="How much of the time before a trigger is saved.",
)
@click.option(
    "--tail", type=Duration(), default="1", show_default=True, metavar="TIME", help="How much of the time after it."
)
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Folder of the recordings.",
)
@click.option("--at-most", default="5/h", show_default=True, metavar="N/TIME", help="Save no more often: 5/h, 1/10m.")
@click.option("--quota", type=Size(), help="Most that the recordings in DIR may take; the oldest are removed first.")
@click.option(
    "--events",
    "event_set",
    type=click.Choice(list(EVENT_SETS)),
    default="lifecycle",
    show_default=True,
    help="As of kvmtrace record; fewer events reach further back.",
)
@click.option(
    "--buffer-size",
    type=Size(),
    help="Kernel buffer per CPU, of each of two instances; default 32M; both take a quarter of memory at most.",
)
@click.option(
    "--summaries", metavar="DEST", help="Summarise each recording for kvmtrace fleet too: folder or URL, as of its -o."
)
@click.option("-d", "--duration", type=Duration(), help="End after so long.")  # fmt: skip
def command(**options: Any) -> None:
    """Record all the time, in memory, and save the last seconds when something happens.

    Says what to watch with one of -a, -p PID, --vm NAME.
    """
    from kvmtrace.capture.recover import reclaim
    from kvmtrace.watch.flight_recorder import watch
    from kvmtrace.watch.service import say

    settings = settings_of(options)
    check_folder(settings.folder, made=False)
    for line in reclaim():
        say(line)
    watch(settings)


def settings_of(options: dict[str, Any]) -> Any:
    """Return what the options ask for.

    Raises
    ------
    UsageError
        They contradict each other.
    """
    from kvmtrace.watch.flight_recorder import WatchSettings
    from kvmtrace.watch.saved_files import parse_at_most
    from kvmtrace.watch.triggers import parse_trigger

    triggers = tuple(parse_trigger(text) for text in options["triggers"])
    at_most = parse_at_most(options["at_most"])
    target = target_of(options)
    folder = options["folder"]
    return WatchSettings(
        record=RecordSettings(
            output=folder / "kvmtrace.dat",
            target=target,
            event_set=options["event_set"],
            buffer_bytes=options["buffer_size"],
            argv=("kvmtrace", *sys.argv[1:]),
        ),
        folder=folder,
        triggers=triggers,
        keep_s=options["keep"],
        tail_s=options["tail"],
        at_most=at_most,
        quota_bytes=options["quota"],
        vm=options["vm"],
        duration_s=options["duration"],
        automaton=automaton_for(triggers),
        summaries=summaries_of(options),
    )


def summaries_of(options: dict[str, Any]) -> str | None:
    """Return where summaries go.

    Raises
    ------
    CapabilityError
        What `kvmtrace fleet` needs is not installed.
    """
    dest: str | None = options["summaries"]
    missing = [name for name in ("fsspec", "pyarrow") if dest is not None and find_spec(name) is None]
    if missing:
        raise CapabilityError(f"{missing[0]} is not installed", "pip install 'kvmtrace[fleet]'")
    return dest


def automaton_for(triggers: Iterable[Trigger]) -> MonitorTable | None:
    """Return the reference model's automaton for this kernel where a trigger steps it."""
    if all(trigger.kind != "monitor" for trigger in triggers):
        return None
    from kvmtrace.check.monitor_table import monitor_table

    return monitor_table(os.uname().release)


def target_of(options: dict[str, Any]) -> TargetSpec:
    """Return the one target that was asked for.

    Raises
    ------
    UsageError
        None, or more than one.
    """
    ways = (("-a", options["machine"]), ("-p", options["pid"]), ("--vm", options["vm"]))
    chosen = [name for name, given in ways if given]
    if len(chosen) != 1:
        wrong = " and ".join(chosen) + " exclude each other" if chosen else "nothing to watch"
        raise UsageError(f"{wrong}; give one of -a, -p PID, --vm NAME")
    if options["machine"]:
        return TargetSpec("all")
    if options["pid"] is not None:
        return TargetSpec("pid", pid=options["pid"])
    from kvmtrace.capture.running_vms import find_one

    return TargetSpec("pid", pid=find_one(options["vm"]).pid)
