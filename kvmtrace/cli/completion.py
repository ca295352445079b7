"""What the shell offers for an option's value; loaded when TAB is pressed there, and failing in silence."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import click
    from click.shell_completion import CompletionItem


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    """Return the names that begin so, whatever the case."""
    return sorted({name for name in names if name.lower().startswith(incomplete.lower())})


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001 (click's signature)
    """Let the shell offer its own files."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def guests(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 (click's signature)
    """Return the bundled guests."""
    from kvmtrace.workload.guests import GUESTS

    return _matching(GUESTS, incomplete)


def guests_of_the_lab(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the bundled guests, and QEMU booting Linux."""
    return _matching([*guests(ctx, param, ""), "linux"], incomplete)


def exit_reasons(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Return the names of exit reasons, of all instruction sets."""
    from kvmtrace.isa.registry import ISAS

    return _matching((name for isa in ISAS for name in isa.names.values()), incomplete)


def clocks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Return the trace clocks of this kernel; none without access to tracefs."""
    from kvmtrace.capture.tracefs import mounted

    place = mounted()
    with contextlib.suppress(OSError):
        if place is not None:
            return _matching((place / "trace_clock").read_text().replace("[", "").replace("]", "").split(), incomplete)
    return []


def processes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001
    """Return the processes that have vCPUs."""
    from kvmtrace.capture.nothing_of_kvm import vcpus_of

    pids = [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in _matching(pids, incomplete) if vcpus_of(int(pid))]
