"""The `kvmtrace` command: finds the subcommand's module, and is the one error boundary."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmtrace import __version__
from kvmtrace.cli.ctrl_c import CtrlC
from kvmtrace.cli.error_line import explain
from kvmtrace.errors import CapabilityError
from kvmtrace.scratch import remove_dead

if TYPE_CHECKING:
    from collections.abc import Sequence

# command -> (module, one-line help). Help stands here so that `kvmtrace --help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "record": ("kvmtrace.cli.record", "Record a VM, a command, a bundled guest or the whole machine."),
    "report": ("kvmtrace.cli.report", "Statistics, time budget and the comparison with the model."),
    "view": ("kvmtrace.cli.view", "The report in a browser, with a timeline read from the recording."),
    "check": ("kvmtrace.cli.check", "Only the comparison with the model, for scripts and CI."),
    "suite": ("kvmtrace.cli.suite", "Run a test suite under the recorder and check each test."),
    "compare": ("kvmtrace.cli.compare", "Compare two recordings, with significance."),
    "export": ("kvmtrace.cli.export", "Write Parquet, CSV, Arrow or Perfetto."),
    "fleet": ("kvmtrace.cli.fleet", "Many recordings: summaries, hosts unlike their peers, groups compared."),
    "model": ("kvmtrace.cli.model", "Show the reference model, or what it predicts for a guest."),
    "lab": ("kvmtrace.cli.lab", "Run a command on an emulated host with real kvm_intel / kvm_amd."),
    "top": ("kvmtrace.cli.top", "Live view of VM-exits."),
    "watch": ("kvmtrace.cli.watch", "Flight recorder: saves the last seconds when something happens."),
    "exporter": ("kvmtrace.cli.exporter", "Counters of the machine's VMs for Prometheus."),
    "doctor": ("kvmtrace.cli.doctor", "What this host can record, and what is missing."),
}


EPILOG = """\b
Example:
  kvmtrace record --guest lifecycle -o run.dat && kvmtrace report run.dat

\b
Exit codes:
  0   done; check: no violation
  1   check: a violation; suite: that, or a failed test; compare --fail-on-regression: a regression
  2   wrong usage
  3   the input is no trace, holds nothing of KVM, or is damaged beyond what can be read
  4   the environment lacks something; the line says what and how to get it
  5   recorded, but --strict, and events were lost or nothing of KVM was recorded
  70  an error that nobody foresaw; please report it
  130 interrupted: Ctrl-C
"""

# what people try first -> the command that does it
OTHER_WORDS = {
    "explain": "'report FILE --explain N'",
    "stat": "'report FILE' or 'record --summary'",
    "summary": "'record --summary' or 'report FILE'",
    "monitor": "'record --monitor'",
    "replay": "'model --replay GUEST' or 'check FILE'",
    "diff": "compare",
    "live": "top",
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """Name the commands in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the module `kvmtrace.cli.NAME` and return its object `command`."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is told with those that are spelt alike."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            alike = [OTHER_WORDS[args[0]]] if args[0] in OTHER_WORDS else []
            alike = alike or difflib.get_close_matches(args[0], COMMANDS, cutoff=0.5)
            hint = f" Did you mean {' or '.join(alike)}?" if alike else ""
            ctx.fail(f"No such command '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Print the table's help lines without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
@click.version_option(__version__, prog_name="kvmtrace")
@click.option("--debug", is_flag=True, help="Show Python tracebacks.")
def cli(debug: bool) -> None:
    """Trace KVM and compare what it did with an executable reference model."""


def _quiet_stdout() -> None:
    """Point standard output at /dev/null, so that the interpreter's last flush stays silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with a documented exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args[:1] or bool(os.environ.get("KVMTRACE_DEBUG"))
    try:
        with CtrlC():
            status = _run(args)
        sys.exit(status)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("kvmtrace: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _quiet_stdout()
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        text, exit_code = explain(_of_stdout(error))
        with contextlib.suppress(OSError):  # nobody reads it
            click.echo(f"kvmtrace: {text}", err=True)
        sys.exit(exit_code)
    finally:
        if "duckdb" not in sys.modules:  # which complains of whatever is not collected
            gc.freeze()  # the process ends: nobody needs the 20 ms that a search for cycles in what it leaves takes


def _run(args: list[str]) -> int:
    """Run a command; return its exit code."""
    remove_dead()
    try:
        status = cli.main(args=args, prog_name="kvmtrace", standalone_mode=False)
    except SystemExit:  # a verdict
        _flush_stdout()
        raise
    _flush_stdout()
    return status if isinstance(status, int) else 0


def _flush_stdout() -> None:
    """Write what standard output still holds.

    Raises
    ------
    CapabilityError
        It takes no more.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _quiet_stdout()
        raise CapabilityError(f"standard output: {error.strerror}", "make room, or choose another place") from error


def _of_stdout(error: Exception) -> Exception:
    """Return the error, named standard output's if it came from printing."""
    if not isinstance(error, OSError) or error.filename is not None:
        return error
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or Path(trace.tb_frame.f_code.co_filename).parent.name != "click":
        return error
    _quiet_stdout()
    return OSError(error.errno, error.strerror, "standard output")


if __name__ == "__main__":
    main()
