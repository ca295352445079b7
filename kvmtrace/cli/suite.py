"""`kvmtrace suite`: a test suite under the recorder, each test checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmtrace.cli.output import check_folder, check_output, force_option, text_width, wants_colour, write
from kvmtrace.cli.parameter_types import MAX_NUMBER, Duration, Size
from kvmtrace.errors import UsageError
from kvmtrace.kvm.tracepoints import EVENT_SETS

if TYPE_CHECKING:
    from kvmtrace.report.outcome import Outcome
    from kvmtrace.suite.listed_test import SuiteTest
    from kvmtrace.suite.suite_run import SuiteSettings

DEFAULT_FOLDER = "kvmtrace-suite"
EPILOG = """\
Example: kvmtrace suite --format junit -o results.xml x86/unittests.cfg

\b
Sources of tests:
  kvmtrace suite x86/unittests.cfg            kvm-unit-tests, built
  kvmtrace suite kselftest_install/           KVM's selftests, installed
  kvmtrace suite tests/ more-tests/           the executables in folders
  kvmtrace suite commands.txt                 a command for the shell per line
  kvmtrace suite -- qemu-system-x86_64 ...    one command

A test passes by exit code 0, and is skipped by 4 (kselftest) or 77 (automake, kvm-unit-tests). One that crashes, or
does not end within its time limit, is told, and the next one runs. What a test leaves running is killed.

Recordings, and what the tests printed, are kept of tests in which something is wrong.

Exit code 1 means a violation of the model, or a test that failed by its own word; 4 that nothing can be recorded here.
"""


class SuiteCommand(click.Command):
    """A command that keeps what stands behind "--" apart from the sources before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the words behind "--" out of what click parses."""
        if "--" in args:
            at = args.index("--")
            ctx.meta["kvmtrace.suite.command"] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)


@click.command("suite", cls=SuiteCommand, epilog=EPILOG)
@click.argument("sources", nargs=-1, metavar="[SOURCE...] [-- CMD ARG...]")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "tap", "junit", "sarif"]),
    default="text",
    show_default=True,
    help="tap: TAP 14; junit: JUnit XML; sarif: SARIF 2.1.0. The lines as text go to standard error then.",
)
@click.option("-o", "--output", metavar="FILE", help="Write the results there.")
@force_option
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_FOLDER,
    show_default=True,
    metavar="DIR",
    help="Where recordings and logs of failures stay.",
)
@click.option("--keep-all", is_flag=True, help="Keep those of tests in which nothing is wrong, too.")
@click.option("--timeout", type=Duration(), default="2m", show_default=True, help="Limit for a test without its own.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only tests of such names; may be repeated.")
@click.option("--leave-out", multiple=True, metavar="PATTERN", help="No tests of such names; may be repeated.")
@click.option("--list", "only_list", is_flag=True, help="Print the tests' names and run none.")
@click.option(
    "--skip-code",
    "skip_codes",
    multiple=True,
    type=click.IntRange(1, 255),
    default=(4, 77),
    show_default=True,
    help="Exit code that means skipped; may be repeated.",
)
@click.option("--backend", type=click.Choice(["auto", "ftrace", "bpf"]), default="auto", show_default=True)
@click.option("--events", "event_set", type=click.Choice(list(EVENT_SETS)), default="lifecycle", show_default=True)
@click.option("--max-size", type=Size(), help="Keep only the newest events of a test, up to this size.")
@click.option("--buffer-size", type=Size(), help="Kernel buffer per CPU.")
@click.option("--limit", type=click.IntRange(0, MAX_NUMBER), default=20, metavar="N", help="Violations told per rule.")
@click.option("--as-root", is_flag=True, help="Under sudo: run the tests as root, not as yourself.")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Run the tests of a suite under the recorder and check each against the reference model."""
    tests = _tests(options, context.meta.get("kvmtrace.suite.command", ()))
    if options["only_list"]:
        write("".join(f"{test.name}{f'  (skipped: {test.skip})' if test.skip else ''}\n" for test in tests), None)
        return
    check_output(options["output"], force=options["force"])
    check_folder(options["keep"])
    outcomes, interrupted = _run(tests, _settings(options), options)
    if options["output_format"] != "text":
        from kvmtrace.render.results import render_outcomes

        write(render_outcomes(outcomes, options["output_format"], "kvmtrace suite"), options["output"])
    if interrupted:
        raise click.Abort
    if any(one.failed for one in outcomes):
        sys.exit(1)


def _tests(options: dict[str, Any], behind: tuple[str, ...]) -> list[SuiteTest]:
    from kvmtrace.suite.listed_test import SuiteTest
    from kvmtrace.suite.suite_tests import find_tests

    if not options["sources"] and not behind:
        raise UsageError("no tests: name a folder, a list of tests, or a command behind --")
    if options["output_format"] == "text" and options["output"]:
        raise UsageError("-o takes the results as --format tap, junit or sarif")
    tests = find_tests(options["sources"], options["only"], options["leave_out"]) if options["sources"] else []
    return tests + ([SuiteTest(Path(behind[0]).name, behind)] if behind else [])


def _settings(options: dict[str, Any]) -> SuiteSettings:
    from kvmtrace.suite.suite_run import SuiteSettings

    return SuiteSettings(
        folder=options["keep"],
        timeout_s=options["timeout"],
        keep_all=options["keep_all"],
        skip_codes=tuple(options["skip_codes"]),
        limit=options["limit"],
        backend=options["backend"],
        event_set=options["event_set"],
        max_bytes=options["max_size"],
        buffer_bytes=options["buffer_size"],
        as_root=options["as_root"],
    )


def _run(tests: list[SuiteTest], settings: SuiteSettings, options: dict[str, Any]) -> tuple[list[Outcome], bool]:
    """Run the tests and tell each as it ends; return the outcomes, and whether somebody interrupted."""
    from kvmtrace.render.terminal import Style
    from kvmtrace.render.text.suite_text import suite_head, suite_totals, test_lines
    from kvmtrace.suite.suite_run import run_suite

    aside = options["output_format"] != "text" and options["output"] in (None, "-")
    style = Style(not aside and wants_colour(), text_width(None))

    def tell(text: str) -> None:
        click.echo(text, err=aside, nl=False)

    outcomes: list[Outcome] = []
    interrupted = False
    tell(suite_head(style))
    try:
        for outcome in run_suite(tests, settings):
            outcomes.append(outcome)
            tell(test_lines(outcome, style))
    except KeyboardInterrupt:
        interrupted = True
    tell("\n" + suite_totals(outcomes, len(tests), style))
    return outcomes, interrupted
