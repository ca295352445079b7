"""Every command has a help page with an example, and the README names only what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmtrace.cli.main import COMMANDS, cli
from kvmtrace.errors import UsageError
from kvmtrace.workload.machines import find_guest

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_an_example(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0
    assert "Example" in done.output


def test_options_named_in_the_readme_exist() -> None:
    command = r"^ +(?:sudo )?kvmtrace (\w+)(?: (run|record|summarize|report|compare|sql))?(.*)$"
    lines = re.findall(command, README, re.MULTILINE)
    assert len(lines) > 10
    for name, sub, rest in lines:
        arguments = [name, sub] if name in ("lab", "fleet") and sub else [name]
        text = CliRunner().invoke(cli, [*arguments, "--help"]).output
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", re.split(r" -- |#", rest)[0]):
            assert option in text, (name, option)


def examples() -> list[tuple[str, list[str]]]:
    """Return (command, lines) of what the README shows of a command's output; "..." ends it."""
    found = []
    for block in re.findall(r"^    \$ (kvmtrace .*)\n((?:    .*\n|\n(?=    ))+)", README, re.MULTILINE):
        lines = [line.removeprefix("    ") for line in block[1].splitlines()]
        found.append((block[0], lines[: lines.index("...")] if "..." in lines else lines))
    return found


@pytest.mark.parametrize(("line", "expected"), examples(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_readme_shows_is_what_the_command_prints(
    line: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("COLUMNS", "100")
    done = CliRunner().invoke(cli, line.split()[1:])
    assert done.output.splitlines()[: len(expected)] == expected


def test_the_readme_shows_output() -> None:
    assert len(examples()) >= 1


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in ("setup", "demo", "test", "test-lab", "bench", "bench-record", "fuzz", "fixtures", "lint", "help"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_shell_completion_knows_the_commands() -> None:
    environment = {**os.environ, "_KVMTRACE_COMPLETE": "bash_complete", "COMP_WORDS": "kvmtrace re", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from kvmtrace.cli.main import main; main()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert {"plain,record", "plain,report"} <= set(done.stdout.split())


def completions(*words: str) -> list[str]:
    environment = os.environ | {
        "_KVMTRACE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["kvmtrace", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "from kvmtrace.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("record", "--guest", "li"), ["lifecycle"]),
        (("lab", "record", "--guest", "lin"), ["linux"]),
        (("model", "--replay", "sm"), ["smp"]),
        (("record", "--exit-reason", "ept_viol"), ["EPT_VIOLATION"]),
        (("record", "--exit-reason", "np"), ["npf"]),
        (("record", "--backend", "b"), ["bpf"]),
        (("record", "--events", "l"), ["lifecycle"]),
        (("record", "--strict", "--guest", "no-such"), []),
        (("report", "run"), ["run"]),  # the shell's own files
        (("view", "run"), ["run"]),
        (("compare", "--base", "run"), ["run"]),
        (("export", "run.dat", "-o", "out"), ["out"]),
    ],
)
def test_values_are_completed(words: tuple[str, ...], offered: list[str]) -> None:
    found = completions(*words)
    assert set(offered) <= set(found)
    assert len(found) < 30


def test_a_guest_that_is_spelt_otherwise() -> None:
    with pytest.raises(UsageError, match="did you mean lifecycle"):
        find_guest("lifecyle")
    with pytest.raises(UsageError, match="; there are"):
        find_guest("xyz")
