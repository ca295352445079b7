"""`kvmtrace record`: parse, choose the back end, record, say what was recorded."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmtrace.capture.recover import reclaim
from kvmtrace.capture.settings import RecordResult, RecordSettings, TargetSpec
from kvmtrace.errors import LostEventsError, UsageError
from kvmtrace.kvm.tracepoints import EVENT_SETS

if TYPE_CHECKING:
    from typing import Any

    IntParam = click.ParamType[int]
    FloatParam = click.ParamType[float]
else:  # generic since click 8.4
    IntParam = FloatParam = click.ParamType

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
TIME_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
DEFAULT_OUTPUT = "kvmtrace.dat"


class Size(IntParam):
    """A number of bytes: 64M, 2G, 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)i?b?", str(value).strip().lower())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no size; write 64M or 2G", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


class ExitReason(FloatParam):
    """An exit reason: its number, or its name in VMX or SVM (HLT, npf)."""

    name = "reason"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; a name that both instruction sets know is the one of the loaded KVM module."""
        from kvmtrace.isa.exit_reasons import EXIT_REASONS, ISA_SVM, ISA_VMX

        text = str(value).strip()
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", text):
            return int(text, 0)
        isas = (ISA_SVM, ISA_VMX) if Path("/sys/module/kvm_amd").is_dir() else (ISA_VMX, ISA_SVM)
        numbers = [number for isa in isas for number, name in EXIT_REASONS[isa].items() if name.lower() == text.lower()]
        if not numbers:
            self.fail(f"{value!r} is no exit reason; examples: EPT_VIOLATION, HLT, npf, 48", param, ctx)
        return numbers[0]


class Duration(FloatParam):
    """A time: 10, 2.5s, 500ms, 3m."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is no time; write 10, 500ms or 3m", param, ctx)
        return float(match[1]) * TIME_UNITS[match[2]]


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
    help="Where the recording goes; an older file of that name is replaced.",
)
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
@click.option("--guest", metavar="NAME", help="Start the bundled guest NAME and record it.")
@click.option("--count", type=click.IntRange(min=1), help="Count argument of the bundled guest.")
@click.option("-p", "--pid", type=click.IntRange(min=1), help="Record a running process, later threads included.")
@click.option("-a", "--all", "machine", is_flag=True, help="Record the whole machine.")
@click.option("-d", "--duration", type=Duration(), help="End after so long: 10, 500ms, 3m.")
@click.option("--max-size", type=Size(), help="Keep only the newest events, up to this size; see below.")
@click.option("--summary", is_flag=True, help="Aggregate in the kernel instead of recording events (bpf).")
@click.option(
    "--thread",
    type=click.IntRange(min=1),
    metavar="TID",
    help="Only this thread of the process given with -p, such as a vCPU's (bpf).",
)
@click.option("--vcpu", type=click.IntRange(min=0), help="Only VM-exits of this vCPU (bpf).")
@click.option(
    "--exit-reason",
    "exit_reasons",
    multiple=True,
    type=ExitReason(),
    metavar="NAME|NUMBER",
    help="Only these VM-exits, with what follows until the next VM-entry (bpf); may be repeated.",
)
@click.option("--sample", type=click.IntRange(min=2), metavar="N", help="Only 1 in N VM-exits of each vCPU (bpf).")
@click.option(
    "--slower-than",
    type=Duration(),
    metavar="TIME",
    help="Only VM-exits with at least so long until the next VM-entry: 50us (bpf).",
)
@click.option("--strict", is_flag=True, help="Exit code 5 if any event was lost.")
@click.option("--clock", metavar="NAME", help="Trace clock (ftrace); default mono, ordered across CPUs.")
@click.option("--buffer-size", type=Size(), help="Kernel buffer per CPU; default 16M, less if memory is short.")
@click.option(
    "--qmp",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="QMP socket of the recorded QEMU: its own word on vCPU threads and types is kept (ftrace).",
)
@click.option("--as-root", is_flag=True, help="Under sudo: run the command as root, not as yourself.")
@click.argument("command_line", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD ARG...]")
def command(
    *,
    output: str,
    backend: str,
    event_set: str,
    guest: str | None,
    count: int | None,
    pid: int | None,
    machine: bool,
    duration: float | None,
    max_size: int | None,
    summary: bool,
    thread: int | None,
    vcpu: int | None,
    exit_reasons: tuple[int, ...],
    sample: int | None,
    slower_than: float | None,
    strict: bool,
    clock: str | None,
    buffer_size: int | None,
    as_root: bool,
    qmp: Path | None,
    command_line: tuple[str, ...],
) -> None:
    """Record a VM until it ends, the time is over, or Ctrl-C.

    Says what to record with one of --guest NAME, -p PID, -a, or a command behind "--".
    """
    spec = target_of(guest, count, pid, machine, command_line)
    if thread is not None:
        check_thread(thread, pid)
    settings = RecordSettings(
        output=Path(output),
        target=replace(spec, as_root=as_root),
        backend=backend,
        event_set=event_set,
        duration_s=duration,
        max_bytes=max_size,
        summary=summary,
        clock=clock,
        buffer_bytes=buffer_size,
        filters=filters_of(thread, vcpu, exit_reasons, sample, slower_than),
        argv=("kvmtrace", *sys.argv[1:]),
        qmp=qmp,
    )
    for line in reclaim(settings.output):
        say(f"kvmtrace: {line}")
    result = run(settings)
    for line in describe(result):
        say(line)
    if strict and result.lost != 0:
        lost = "some" if result.lost is None else f"{result.lost:,}"
        raise LostEventsError(f"{result.path}: {lost} events were lost; try a larger --buffer-size")


def check_thread(thread: int, pid: int | None) -> None:
    """Raise UsageError unless the thread is one of that process."""
    if pid is None:
        raise UsageError("--thread needs the process: -p PID --thread TID")
    if not Path(f"/proc/{pid}/task/{thread}").is_dir():
        raise UsageError(f"process {pid} has no thread {thread}")


def filters_of(
    thread: int | None, vcpu: int | None, exit_reasons: tuple[int, ...], sample: int | None, slower_than: float | None
) -> dict[str, Any]:
    """Return RecordSettings.filters: those that were asked for."""
    given = {
        "thread": thread,
        "vcpu": vcpu,
        "exit_reason": exit_reasons or None,
        "sample": sample,
        "slower_than_ns": None if slower_than is None else round(slower_than * 1e9),
    }
    return {name: value for name, value in given.items() if value is not None}


def say(line: str) -> None:
    """Print a line for people on standard error; that nobody reads it is no reason to fail."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(line, err=True)


def target_of(
    guest: str | None, count: int | None, pid: int | None, machine: bool, command_line: tuple[str, ...]
) -> TargetSpec:
    """Return the one target that was asked for.

    Raises
    ------
    UsageError
        None, or more than one.
    """
    ways = (("--guest", guest), ("-p", pid), ("-a", machine), ("a command", command_line))
    chosen = [name for name, given in ways if given]
    if len(chosen) != 1:
        wrong = " and ".join(chosen) + " exclude each other" if chosen else "nothing to record"
        raise UsageError(f"{wrong}; give one of --guest NAME, -p PID, -a, or -- CMD ARG...")
    if count is not None and guest is None:
        raise UsageError("--count belongs to --guest")
    if guest is not None:
        arguments = () if count is None else ("--count", str(count))
        return TargetSpec("guest", guest=guest, guest_arguments=arguments)
    if pid is not None:
        return TargetSpec("pid", pid=pid)
    return TargetSpec("all") if machine else TargetSpec("command", command=command_line)


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


def describe(result: RecordResult) -> list[str]:
    """Say what was recorded, what was lost and what it cost."""
    meta = result.meta
    seconds = (meta.get("duration_ns") or 0) / 1e9
    count = "events" if result.n_events is None else f"{result.n_events:,} events"
    rate = f" ({result.n_events / seconds:,.0f}/s)" if result.n_events and seconds else ""
    what = f"recorded {count}{rate} in {seconds:.2f} s with {meta['backend']}"
    lines = [f"{what}: {result.path} ({human_bytes(result.file_bytes)})"]
    if result.by_kind:
        top = sorted(result.by_kind.items(), key=lambda item: -item[1])
        lines.append(
            "  " + ", ".join(f"{name} {count:,}" for name, count in top[:6]) + (", ..." if len(top) > 6 else "")
        )
    each = f", {result.recorder_cpu_s / result.n_events * 1e9:,.0f} ns per event" if result.n_events else ""
    cost = f"the recorder took {result.recorder_cpu_s:.2f} s of CPU time{each}"
    if meta.get("cost_ns_per_event"):
        cost += f", the traced threads {meta['cost_ns_per_event']:.0f} ns per event"
    lines.append(f"lost {describe_loss(result)}; {cost}")
    discarded = meta.get("discarded")
    if discarded:
        lines.append(f"older events deleted to keep the size: {discarded['events']:,}")
    lines += [f"note: {note}" for note in meta.get("notes", [])]
    if result.ended_by not in ("target", "time", "interrupt"):
        lines.append(f"the recording ended early: {result.ended_by}")
    if result.target_status:
        lines.append(f"the target {describe_status(result.target_status)}")
    return lines


def describe_loss(result: RecordResult) -> str:
    """Say how many events were lost, and where."""
    if result.lost is None:
        return "an unknown number of events"
    if not result.lost:
        return "0 events"
    by_cpu = ", ".join(f"CPU {cpu}: {count:,}" for cpu, count in result.meta["loss"]["by_cpu"].items())
    return f"{result.lost:,} events ({by_cpu})"


def describe_status(status: int) -> str:
    """Put an exit status in words."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"


def human_bytes(size: float) -> str:
    """Return a size for people: 3.2 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
