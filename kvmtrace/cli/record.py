"""`kvmtrace record`: parse, choose the back end, record, say what was recorded."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmtrace.capture.invoking_user import invoking_user
from kvmtrace.capture.recover import reclaim, reclaim_file
from kvmtrace.capture.running_vms import find_one
from kvmtrace.capture.settings import RecordResult, RecordSettings, TargetSpec
from kvmtrace.cli.completion import clocks, exit_reasons, guests, processes
from kvmtrace.cli.output import check_output, force_option
from kvmtrace.cli.parameter_types import MAX_NUMBER, MAX_PID, Duration, ExitReason, Size
from kvmtrace.cli.recording_told import describe
from kvmtrace.errors import LostEventsError, UsageError
from kvmtrace.kvm.tracepoints import EVENT_SETS

if TYPE_CHECKING:
    from typing import Any

    from kvmtrace.capture.bpf.monitor import Table

DEFAULT_OUTPUT = "kvmtrace.dat"


EPILOG = """\b
Examples:
  kvmtrace record --guest lifecycle -o run.dat
  kvmtrace record -p $(pidof qemu-system-x86_64) -d 10
  kvmtrace record --max-size 500M -o vm.dat -- qemu-system-x86_64 -accel kvm ...

A target's threads are recorded, later ones and its children included; what other threads do to it (vhost, an
irqfd served by a kernel worker, an interrupt that arrives while another thread runs) is only seen with -a.

A command is started as the user who called sudo, and ended with SIGTERM when the recording ends first. The
recording appears under its name when it is complete, belongs to that user and is readable by nobody else.
If the recorder is killed, the next kvmtrace command finishes the file.

With --max-size the newest events are kept: while recording, the oldest are deleted, and counted, so that no
more than SIZE (plus the header) is on the disk.
"""


@click.command("record", epilog=EPILOG, context_settings={"allow_interspersed_args": False})
@click.option(
    "-o",
    "--output",
    default=DEFAULT_OUTPUT,
    show_default=True,
    metavar="FILE",
    help="Where the recording goes; an older recording is written over only with --force.",
)
@force_option
@click.option(
    "--backend",
    type=click.Choice(["auto", "ftrace", "bpf"]),
    default="auto",
    show_default=True,
    help="Recorder; auto takes the one that records most on this host.",
)
@click.option(
    "--events",
    "event_set",
    type=click.Choice(list(EVENT_SETS)),
    default="lifecycle",
    show_default=True,
    help="minimal: VM-entry, VM-exit, userspace exit; lifecycle: all that the reference "
    "model can use; all: every KVM tracepoint too.",
)
@click.option(
    "--guest",
    metavar="NAME|FILE.lst",
    shell_complete=guests,
    help="Start the bundled guest NAME, or that of FILE.lst, and record it.",
)
@click.option("--count", type=click.IntRange(1, MAX_NUMBER), help="Count argument of the bundled guest.")
@click.option(
    "-p",
    "--pid",
    type=click.IntRange(1, MAX_PID),
    shell_complete=processes,
    help="Record a running process, later threads included.",
)
@click.option("--vm", metavar="NAME|UUID", help="Record the running VM of this name or uuid; may be a pattern.")
@click.option("-a", "--all", "machine", is_flag=True, help="Record the whole machine.")
@click.option("-d", "--duration", type=Duration(), help="End after so long: 10, 500ms, 3m.")
@click.option("--max-size", type=Size(), help="Keep only the newest events, up to this size; see below.")
@click.option("--summary", is_flag=True, help="Aggregate in the kernel instead of recording events (bpf).")
@click.option(
    "--monitor",
    is_flag=True,
    help="Step the reference model's automaton in the kernel instead of recording events, and tell what it "
    "forbids (bpf); exit code 1 then.",
)
@click.option(
    "--thread",
    type=click.IntRange(1, MAX_PID),
    metavar="TID",
    help="Only this thread of the process given with -p, such as a vCPU's (bpf).",
)
@click.option("--vcpu", type=click.IntRange(0, MAX_NUMBER), help="Only VM-exits of this vCPU (bpf).")
@click.option(
    "--exit-reason",
    "exit_reasons",
    multiple=True,
    type=ExitReason(),
    shell_complete=exit_reasons,
    metavar="NAME|NUMBER",
    help="Only these VM-exits, with what follows until the next VM-entry (bpf); may be repeated.",
)
@click.option(
    "--sample", type=click.IntRange(2, MAX_NUMBER), metavar="N", help="Only 1 in N VM-exits of each vCPU (bpf)."
)
@click.option(
    "--slower-than",
    type=Duration(),
    metavar="TIME",
    help="Only VM-exits with at least so long until the next VM-entry: 50us (bpf).",
)
@click.option("--strict", is_flag=True, help="Exit code 5 if any event was lost, or no KVM event was recorded.")
@click.option(
    "--clock", metavar="NAME", shell_complete=clocks, help="Trace clock (ftrace); default mono, ordered across CPUs."
)
@click.option(
    "--buffer-size",
    type=Size(),
    help="Kernel buffer per CPU; default 16M; all of them take a quarter of the available memory at most.",
)
@click.option(
    "--qmp",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="QMP socket of the recorded QEMU: its own word on vCPU threads and types is kept (ftrace).",
)
@click.option("--as-root", is_flag=True, help="Under sudo: run the command as root, not as yourself.")
@click.argument("command_line", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD ARG...]")
def command(**options: Any) -> None:
    """Record a VM until it ends, the time is over, or Ctrl-C.

    Say what to record with one of --guest NAME, -p PID, --vm NAME, -a, or a command behind "--".
    """
    settings = settings_of(options)
    check_output(settings.output, force=options["force"])
    invoking_user()  # a user that cannot be is told before anything is started
    for line in (*reclaim(), *reclaim_file(settings.output)):
        say(f"kvmtrace: {line}")
    result = run(settings)
    for line in describe(result):
        say(line)
    if options["strict"]:
        require_complete(result)
    if result.meta.get("n_forbidden"):
        sys.exit(1)


def require_complete(result: RecordResult) -> None:
    """Raise LostEventsError if events were lost or nothing of KVM was recorded."""
    if result.lost != 0:
        lost = "some" if result.lost is None else f"{result.lost:,}"
        raise LostEventsError(f"{result.path}: {lost} events were lost; try a larger --buffer-size")
    if result.kvm_seen is False:
        raise LostEventsError(f"{result.path}: no KVM event was recorded; the note above says why")


def settings_of(options: dict[str, Any]) -> RecordSettings:
    """Return what the options ask for.

    Raises
    ------
    UsageError
        They contradict each other.
    """
    target = target_of(options)
    if options["thread"] is not None:
        check_thread(options["thread"], options["pid"])
    if options["qmp"] is not None:
        check_qmp(options, target)
    return RecordSettings(
        output=Path(options["output"]),
        target=target,
        backend=options["backend"],
        event_set=options["event_set"],
        duration_s=options["duration"],
        max_bytes=options["max_size"],
        summary=options["summary"],
        clock=options["clock"],
        buffer_bytes=options["buffer_size"],
        filters=filters_of(options),
        argv=("kvmtrace", *sys.argv[1:]),
        qmp=options["qmp"],
        monitor=automaton() if options["monitor"] else None,
        tell=say,
    )


def automaton() -> Table:
    """Return the automaton for this kernel."""
    from kvmtrace.check.monitor_table import monitor_table

    return monitor_table(os.uname().release)


def check_qmp(options: dict[str, Any], target: TargetSpec) -> None:
    """Raise UsageError where nobody can answer at --qmp, or nobody asks."""
    if target.kind not in ("pid", "command"):
        raise UsageError("--qmp asks the QEMU that is recorded: give -p PID, or QEMU's command")
    if options["backend"] == "bpf" or options["summary"]:
        raise UsageError("--qmp needs --backend ftrace")
    if target.kind == "pid" and not options["qmp"].is_socket():
        raise UsageError(f"--qmp {options['qmp']}: no such socket")


def check_thread(thread: int, pid: int | None) -> None:
    """Raise UsageError unless the thread is one of that process."""
    if pid is None:
        raise UsageError("--thread needs the process: -p PID --thread TID")
    if not Path(f"/proc/{pid}/task/{thread}").is_dir():
        raise UsageError(f"process {pid} has no thread {thread}")


def filters_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return RecordSettings.filters: those that were asked for."""
    slower_than = options["slower_than"]
    given = {
        "thread": options["thread"],
        "vcpu": options["vcpu"],
        "exit_reason": options["exit_reasons"] or None,
        "sample": options["sample"],
        "slower_than_ns": None if slower_than is None else round(slower_than * 1e9),
    }
    return {name: value for name, value in given.items() if value is not None}


def say(line: str) -> None:
    """Print a line for people on standard error; that nobody reads it is no reason to fail."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(line, err=True)


def target_of(options: dict[str, Any]) -> TargetSpec:
    """Return the one target that was asked for.

    Raises
    ------
    UsageError
        None, or more than one.
    """
    guest, pid, vm, command_line = options["guest"], options["pid"], options["vm"], options["command_line"]
    ways = (("--guest", guest), ("-p", pid), ("--vm", vm), ("-a", options["machine"]), ("a command", command_line))
    chosen = [name for name, given in ways if given]
    if len(chosen) != 1:
        wrong = " and ".join(chosen) + " exclude each other" if chosen else "nothing to record"
        raise UsageError(f"{wrong}; give one of --guest NAME, -p PID, --vm NAME, -a, or -- CMD ARG...")
    if options["count"] is not None and guest is None:
        raise UsageError("--count belongs to --guest")
    if guest is not None:
        arguments = () if options["count"] is None else ("--count", str(options["count"]))
        return TargetSpec("guest", guest=guest, guest_arguments=arguments)
    if pid is not None:
        return TargetSpec("pid", pid=pid)
    if vm is not None:
        return TargetSpec("pid", pid=find_one(vm).pid)
    if options["machine"]:
        return TargetSpec("all")
    return TargetSpec("command", command=command_line, as_root=options["as_root"])


def run(settings: RecordSettings) -> RecordResult:
    """Record with the back end that was asked for, or that suits best."""
    from kvmtrace.capture.backend import choose_backend

    name, why = choose_backend(settings)
    if why and sys.stderr.isatty():
        say(f"recording with {name}: {why}")
    recorder = import_module(
        "kvmtrace.capture.bpf.bpf_recorder" if name == "bpf" else "kvmtrace.capture.ftrace.ftrace_recorder"
    )
    result = recorder.record(settings)
    assert isinstance(result, RecordResult)
    return result
