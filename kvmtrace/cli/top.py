"""`kvmtrace top`: who exits how often and why, and where the vCPUs' time goes, live."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from dataclasses import field
from typing import TYPE_CHECKING, Any

import click

from kvmtrace.capture import pid_namespace
from kvmtrace.capture.host import kvm_modules
from kvmtrace.capture.nothing_of_kvm import vcpus_of
from kvmtrace.capture.running_vms import Vms, find_running, matches
from kvmtrace.cli.completion import processes
from kvmtrace.cli.parameter_types import MAX_PID, VM_HELP, FiniteRange
from kvmtrace.errors import UsageError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from kvmtrace.capture.bpf.rates import VcpuRates
    from kvmtrace.capture.bpf.summary_maps import SummaryPrograms

SORT_KEYS = {"e": "exits", "g": "guest", "k": "kernel", "u": "userspace", "b": "blocked", "v": "vcpu"}
HELP_LINE = "q quit  p pause  sort: e exits  g guest  k kernel  u VMM  b blocked  v vCPU"
N_REASONS = 3
NO_EXITS = (
    "this KVM traces no VM-entries and VM-exits: exits are those to the VMM, and guest and kernel time are "
    "one (KVM_RUN)"
)


@dataclass
class Screen:
    """What is shown and how.

    Parameters
    ----------
    sort : a value of SORT_KEYS
    paused : bool, keep what is shown
    rates : the rows
    seconds : float, time they cover
    pid : the one process that is watched, or None
    vm : only the VMs that this means, or None
    names : process -> its VM's name
    n_vms, n_vcpus : how many are open, where nothing of them was seen yet
    """

    sort: str = "exits"
    paused: bool = False
    rates: list[VcpuRates] = field(default_factory=list)
    seconds: float = 0.0
    pid: int | None = None
    n_vms: int = 0
    n_vcpus: int = 0
    vm: str | None = None
    names: dict[int, str] = field(default_factory=dict)

    def label(self, pid: int) -> str:
        """Return what a VM is called."""
        name = self.names.get(pid)
        process = f"{pid} {process_name(pid)}"
        return process if name is None else f"{printable(name)} ({process})"

    def press(self, key: str) -> bool:
        """React to a key; False means that it is time to go."""
        if key == "p":
            self.paused = not self.paused
        elif key in SORT_KEYS:
            self.sort = SORT_KEYS[key]
        return key not in ("q", "\x03")


def exit_rate(row: VcpuRates) -> float:
    """Return exits per second: VM-exits, or userspace exits where the former are not traced."""
    return row.exit_rate or row.userspace_rate


def arrange(rates: list[VcpuRates], sort: str) -> list[VcpuRates]:
    """Return the rows grouped by VM, the busiest VM first, vCPUs by the sort key."""

    def weight(row: VcpuRates) -> float:
        if sort == "vcpu":
            return 0.0
        return exit_rate(row) if sort == "exits" else row.shares[sort]

    vms: dict[int, float] = {}
    for row in rates:
        vms[row.pid] = vms.get(row.pid, 0.0) + weight(row)
    return sorted(rates, key=lambda row: (-vms[row.pid], row.pid, -weight(row), row.vcpu_id or 0, row.tid))


def describe_reasons(row: VcpuRates) -> str:
    """Return the most frequent exit reasons with their rates."""
    from kvmtrace.isa.registry import BY_NAME
    from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason

    if row.exits:
        isa = BY_NAME.get(row.isa or "")
        named = [(isa.describe(reason) if isa else f"{reason:#x}", rate) for reason, rate in row.exits.items()]
    else:
        named = [
            (describe_userspace_exit_reason(key) if isinstance(key, int) else f"errno {key}", rate)
            for key, rate in row.userspace_exits.items()
        ]
    return ", ".join(f"{name.removeprefix('KVM_EXIT_')} {rate:,.0f}" for name, rate in named[:N_REASONS])


def process_name(pid: int) -> str:
    """Return the VMM's name, "" if it is gone."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:  # noqa: PTH123 (pathlib costs more, once a second)
            text = file.read().strip()
    except OSError:
        return ""
    return printable(text)


def printable(text: str) -> str:
    """Return a text that moves no cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def headline(screen: Screen) -> str:
    """Return the first line."""
    rates = screen.rates
    vms = len({row.pid for row in rates}) or screen.n_vms
    vcpus = len(rates) or screen.n_vcpus
    text = (
        f"{vms} VM{'' if vms == 1 else 's'}, {vcpus} vCPU{'' if vcpus == 1 else 's'}, "
        f"{sum(map(exit_rate, rates)):,.0f} exits/s, sorted by {screen.sort}"
    )
    return text + ("  PAUSED" if screen.paused else "")


def remark(screen: Screen) -> str:
    """Return what must be said beside the rows; "" if nothing."""
    if screen.rates:
        return "" if any(row.exits for row in screen.rates) else NO_EXITS
    if not screen.n_vcpus and screen.pid is None:
        return "no vCPU has run yet" if screen.vm is None else f"no vCPU of {screen.vm} has run yet"
    if not screen.n_vcpus:
        return f"process {screen.pid} has no vCPU"
    untraced = ", which this KVM does not trace" if "kvm_pvm" in kvm_modules() else ""
    whose = "its" if screen.n_vms == 1 else "their"
    return f"nothing was seen of {whose} vCPUs yet: they wait, or run in the guest without leaving it{untraced}"


def cells(row: VcpuRates, label: str) -> list[str]:
    """Return the columns of a row, as text."""
    seen = bool(row.exits) or row.vcpu_id is not None
    shares = [f"{100 * row.shares[phase]:.1f}" for phase in ("guest", "kernel", "userspace", "blocked", "preempted")]
    if not seen:
        shares[0] = "-"
    vcpu = "-" if row.vcpu_id is None else str(row.vcpu_id)
    return [
        label,
        vcpu,
        str(row.tid),
        f"{exit_rate(row):,.0f}",
        f"{row.userspace_rate:,.0f}",
        *shares,
        describe_reasons(row),
    ]


COLUMNS = (
    "VM",
    "vCPU",
    "thread",
    "exits/s",
    "to VMM/s",
    "guest%",
    "kernel%",
    "VMM%",
    "blocked%",
    "preempt%",
    "exits by reason /s",
)


def render(screen: Screen) -> RenderableType:
    """Return the screen for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for i, name in enumerate(COLUMNS):
        text_column = i in (0, len(COLUMNS) - 1)
        table.add_column(name, justify="left" if text_column else "right", no_wrap=True, ratio=1 if i == 10 else None)
    last = None
    for row in arrange(screen.rates, screen.sort):
        texts = cells(row, screen.label(row.pid))
        if row.pid == last:
            texts[0] = ""
        last = row.pid
        table.add_row(*(Text(text) for text in texts))
    parts: list[RenderableType] = [Text(headline(screen), style="bold"), table]
    if text := remark(screen):
        parts.append(Text(text, style="yellow" if screen.rates else "dim"))
    return Group(*parts, Text(HELP_LINE, style="dim"))


def render_plain(screen: Screen) -> str:
    """Return the screen as lines for a pipe."""
    rows = [COLUMNS, *(cells(row, screen.label(row.pid)) for row in arrange(screen.rates, screen.sort))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            text.ljust(width) if i in (0, 10) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    note = remark(screen)
    return "\n".join([headline(screen), *lines, *([note] if note else [])])


@contextlib.contextmanager
def single_keys() -> Iterator[None]:
    """Let standard input give every key at once, unechoed."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class Sampler:
    """Looks at the maps and keeps the last look.

    Parameters
    ----------
    programs : SummaryPrograms, attached
    """

    def __init__(self, programs: SummaryPrograms) -> None:
        self.programs = programs
        self._ids_are_ours = pid_namespace.is_initial()
        self.at_ns = time.monotonic_ns()
        self.rows: list[dict[str, Any]] = programs.snapshot(self.at_ns)
        self._vms = Vms(programs.tgid)
        self._vms.look(force=True)

    def look(self, screen: Screen) -> None:
        """Put the rates since the last look on the screen; threads that have ended are left out."""
        from kvmtrace.capture.bpf.rates import rates_between

        now = time.monotonic_ns()
        rows = [row for row in self.programs.snapshot(now) if self._lives(row)]
        self._vms.look()
        known = self._vms.rows()
        screen.names = {vm.pid: vm.name for vm in known if vm.name}
        if screen.vm is not None:
            meant = {vm.pid for vm in known if matches(vm, screen.vm)}
            rows = [row for row in rows if row["pid"] in meant]
        screen.seconds = (now - self.at_ns) / 1e9
        screen.rates = rates_between(self.rows, rows, max(screen.seconds, 1e-9))
        if not screen.rates:
            self._count_open(screen, [vm.pid for vm in known if screen.vm is None or matches(vm, screen.vm)])
        self.at_ns, self.rows = now, rows

    @staticmethod
    def _count_open(screen: Screen, pids: list[int]) -> None:
        """Note how many VMs and vCPUs there are of which nothing was seen."""
        open_vcpus = [n for pid in ({screen.pid} if screen.pid else set(pids)) if (n := vcpus_of(pid))]
        screen.n_vms, screen.n_vcpus = len(open_vcpus), sum(open_vcpus)

    def _lives(self, row: dict[str, Any]) -> bool:
        """Say whether the thread is still there; in a container, whose ids are others, nobody knows."""
        return not self._ids_are_ours or os.path.exists(f"/proc/{row['pid']}/task/{row['tid']}")  # noqa: PTH110


def show_plain(sampler: Sampler, screen: Screen, interval_s: float, count: int | None) -> None:
    """Print a block of lines per interval."""
    done = 0
    while count is None or done < count:
        time.sleep(interval_s)
        sampler.look(screen)
        click.echo(render_plain(screen) + "\n")
        sys.stdout.flush()
        done += 1


def show_live(sampler: Sampler, screen: Screen, interval_s: float, count: int | None) -> None:
    """Redraw the terminal per interval and at every key."""
    from rich.live import Live

    done, due = 0, time.monotonic() + interval_s
    with single_keys(), Live(render(screen), screen=True, auto_refresh=False) as live:
        while count is None or done < count:
            if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
                key = os.read(sys.stdin.fileno(), 1).decode("ascii", "replace")
                if not key or not screen.press(key):  # nothing to read: the terminal is gone
                    return
            if time.monotonic() >= due:
                due, done = time.monotonic() + interval_s, done + 1
                if not screen.paused:
                    sampler.look(screen)
            live.update(render(screen), refresh=True)


def _pid_of(vm: str, pid: int | None) -> int | None:
    """Return the one process that runs the VM; None if several do, or none as yet: then the machine is watched."""
    if pid is not None:
        raise UsageError("-p and --vm exclude each other")
    pid_namespace.require_initial("top --vm", "top without it")
    found = find_running(vm)
    return found[0].pid if len(found) == 1 and not set("*?[") & set(vm) else None


@click.command(
    "top",
    epilog="Example: kvmtrace top -p $(pidof qemu-system-x86_64). In a pipe it prints plain "
    "blocks: kvmtrace top -n 3 -i 2 | cat",
)
@click.option(
    "-p", "--pid", type=click.IntRange(1, MAX_PID), shell_complete=processes, help="Only this VM (the VMM's process)."
)
@click.option("--vm", metavar="NAME|UUID", help=VM_HELP)
@click.option(
    "-i", "--interval", type=FiniteRange(0.1, 86400), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many looks.")
@click.option(
    "--sort",
    type=click.Choice(list(SORT_KEYS.values())),
    default="exits",
    show_default=True,
    help="Order of the vCPUs within a VM, and of the VMs.",
)
def command(*, pid: int | None, vm: str | None, interval: float, count: int | None, sort: str) -> None:
    """Show VMs and vCPUs live: exits per second by reason, and where their time goes.

    Counts grow in BPF maps of the kernel, no events are sent: watching costs next to nothing.
    """
    from kvmtrace.capture.bpf.detach import closing_elsewhere
    from kvmtrace.capture.bpf.summary_maps import SummaryPrograms

    if pid is not None:
        pid_namespace.require_initial("top -p", "top without it")
    if pid is not None and not os.path.isdir(f"/proc/{pid}"):  # noqa: PTH112
        raise UsageError(f"there is no process {pid}")
    if vm is not None:
        pid = _pid_of(vm, pid)
    programs = SummaryPrograms(pid)
    try:
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task")] if pid else []  # noqa: PTH208
        programs.attach(tids)
        live = sys.stdout.isatty() and sys.stdin.isatty()
        with contextlib.suppress(KeyboardInterrupt):
            (show_live if live else show_plain)(Sampler(programs), Screen(sort, pid=pid, vm=vm), interval, count)
    finally:
        with closing_elsewhere():
            programs.close()
