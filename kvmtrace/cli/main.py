"""The `kvmtrace` command: finds the subcommand's module, and is the one error boundary."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING

import click

from kvmtrace import __version__
from kvmtrace.errors import KvmtraceError

if TYPE_CHECKING:
    from collections.abc import Sequence

# command -> (module, one-line help). Help stands here so that `kvmtrace --help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "record": ("kvmtrace.cli.record", "Record a VM, a command, a bundled guest or the whole machine."),
    "report": ("kvmtrace.cli.report", "Statistics, time budget and the comparison with the model."),
    "check": ("kvmtrace.cli.check", "Only the comparison with the model, for scripts and CI."),
    "compare": ("kvmtrace.cli.compare", "Compare two recordings, with significance."),
    "export": ("kvmtrace.cli.export", "Write Parquet, CSV, Arrow or Perfetto."),
    "model": ("kvmtrace.cli.model", "Show the reference model, or what it predicts for a guest."),
    "lab": ("kvmtrace.cli.lab", "Run a command on an emulated host with real kvm_intel / kvm_amd."),
    "top": ("kvmtrace.cli.top", "Live view of VM-exits."),
    "doctor": ("kvmtrace.cli.doctor", "What this host can record, and what is missing."),
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Print the table's help lines without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: kvmtrace record --guest lifecycle -o run.dat && kvmtrace report run.dat",
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
        status = cli.main(args=args, prog_name="kvmtrace", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
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
    except KvmtraceError as error:
        if debug:
            raise
        click.echo(f"kvmtrace: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug:
            raise
        name = f"{error.filename}: " if error.filename else ""
        click.echo(f"kvmtrace: {name}{error.strerror or error}", err=True)
        sys.exit(4 if isinstance(error, PermissionError) else 3)
    except MemoryError:
        if debug:
            raise
        click.echo("kvmtrace: out of memory", err=True)
        sys.exit(4)
    finally:
        gc.freeze()  # the process ends: nobody needs the 20 ms that a search for cycles in what it leaves takes


if __name__ == "__main__":
    main()
