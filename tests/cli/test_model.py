"""`kvmtrace model` as a user runs it."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from kvmtrace.cli.model import command, render_model
from kvmtrace.errors import UsageError
from kvmtrace.render.model.prediction import render_prediction


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_formats() -> None:
    assert run("--isa", "vmx").startswith("kvmtrace reference model")
    assert run("--format", "dot").startswith("digraph")
    assert ET.fromstring(run("--format", "svg", "--isa", "svm")).tag.endswith("svg")
    assert json.loads(run("--format", "json", "--isa", "vmx"))["exits"].keys() == {"vmx"}


def test_help_has_an_example() -> None:
    assert "kvmtrace model --" in run("--help")


@pytest.mark.parametrize("isa", ["vmx", "svm"])
def test_replay_predicts_a_guest(isa: str) -> None:
    text = run("--replay", "lifecycle", "--isa", isa)
    assert "out dx, al" in text
    assert "kvm_userspace_exit" in text
    document = json.loads(run("--replay", "lifecycle", "--isa", isa, "--format", "json"))
    steps = document["vcpus"][0]["steps"]
    assert sum(step["event"] == "kvm_entry" for step in steps) == sum(s["event"] == "kvm_exit" for s in steps) > 100
    assert f"{len(steps):,} events" in text


def test_count_reaches_the_guest() -> None:
    few, many = (len(render_prediction("storm", "vmx", "text", count)) for count in (3, 300))
    assert many > 10 * few


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--replay", "nonesuch"), "no bundled guest"),
        (("--replay", "lifecycle", "--format", "svg"), "text or json"),
        (("--count", "3"), "belongs to --replay"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CliRunner().invoke(command, list(arguments), catch_exceptions=False)


def test_render_model_is_deterministic() -> None:
    assert render_model(None, "svg") == render_model(None, "svg")
