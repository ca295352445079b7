"""`python -m kvmtrace.workload`: run a bundled guest; the package's docstring describes the handshake."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from kvmtrace.errors import KvmtraceError, UsageError
from kvmtrace.workload.guest_run import DEFAULT_TIMEOUT_S, SLOW_REASONS, complete_arguments, run_guest, runnable_guest
from kvmtrace.workload.host_isa import guess_isa
from kvmtrace.workload.machines import machine_of
from kvmtrace.workload.result import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.workload.result import GuestRun


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    guests = "\n".join(f"  {guest.name:<13} {guest.summary}" for guest in machine_of(guess_isa()).guests.values())
    parser = argparse.ArgumentParser(
        prog="python -m kvmtrace.workload",
        description="Run a bundled guest on /dev/kvm.",
        epilog=f"guests:\n{guests}\n\nexample: python -m kvmtrace.workload lifecycle --count 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="one of the guests below")
    parser.add_argument("--count", type=int, help="how often; the default is the guest's own")
    parser.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="another argument")
    parser.add_argument(
        "--slow-reason",
        action="append",
        default=[],
        metavar="REASON:NS",
        help=f"wait NS before serving each userspace exit ({', '.join(SLOW_REASONS)})",
    )
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="SECONDS")
    parser.add_argument("--ready-fd", type=int, metavar="FD", help="write one byte when up")
    parser.add_argument("--go-fd", type=int, metavar="FD", help="wait for one byte before opening /dev/kvm")
    parser.add_argument("--json-fd", type=int, metavar="FD", help="write the GuestRun as JSON at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args(argv)
    try:
        run = _run(options)
    except KvmtraceError as error:
        print(f"kvmtrace.workload: {error}", file=sys.stderr)
        _write_json(
            options.json_fd,
            json.dumps({"schema": SCHEMA, "guest": options.name, "error": str(error), "exit_code": error.exit_code}),
        )
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if run is None:
        return 1
    _write_json(options.json_fd, run.to_json())
    if options.json_fd is None:
        print(describe_run(run))
    return 0 if run.succeeded else 1


def _run(options: argparse.Namespace) -> GuestRun | None:
    """Check everything that can be checked, shake hands, run; None if the recorder gave up."""
    guest = runnable_guest(options.name, guess_isa())
    arguments = dict(_pair(text, "=") for text in options.arg)
    if options.count is not None:
        arguments["count"] = options.count
    arguments = complete_arguments(guest, arguments)
    slow_ns = dict(_pair(text, ":") for text in options.slow_reason)
    assert guest.listing.lines  # read now, so that its file access is not part of the recording
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"R")
        os.close(options.ready_fd)
    if options.go_fd is not None and not os.read(options.go_fd, 1):
        return None
    return run_guest(options.name, arguments, timeout_s=options.timeout, slow_ns=slow_ns)


def _pair(text: str, separator: str) -> tuple[str, int]:
    key, found, value = text.partition(separator)
    if not found or not value.isdecimal():
        raise UsageError(f"expected NAME{separator}NUMBER, not {text}")
    return key, int(value)


def _write_json(fd: int | None, text: str) -> None:
    if fd is not None:
        with os.fdopen(fd, "w", encoding="ascii") as stream:
            stream.write(text + "\n")


def describe_run(run: GuestRun) -> str:
    """Return the run in a few lines for people."""
    arguments = " ".join(f"{name}={value}" for name, value in run.arguments.items())
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(run.observed.items()))
    verdict = "ended as it should" if run.succeeded else "FAILED"
    return (
        f"{run.guest} {arguments}: {verdict} ({run.ended}, status {run.status}) after "
        f"{run.duration_ns / 1e6:.1f} ms on {run.isa or 'an unknown KVM'}\nuserspace exits: {counts}"
    )


if __name__ == "__main__":
    sys.exit(main())
