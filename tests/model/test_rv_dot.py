"""The automaton for Runtime Verification: read as dot2k reads it, it is the transition table."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import takewhile

import pytest
from click.testing import CliRunner

from kvmtrace.check.state_machine import ILLEGAL, STATE, compile_for
from kvmtrace.cli.main import cli
from kvmtrace.render.model.rv_dot import TRAITS, identifier, render_rv_dot, tracepoint_steps

EDGE = re.compile(r'"(\w+)" -> "(\w+)" \[ label = "([\w\\]+)" \];')


def read_as_dot2k(text: str) -> tuple[str, list[str], dict[tuple[str, str], str]]:
    """Return initial state, states and (state, event) -> next state, by the rules of tools/verification/dot2."""
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["digraph", "state_automaton"]
    begin = next(i for i, line in enumerate(lines) if line.split()[0] == "{node")
    nodes = list(takewhile(lambda line: line.split()[0] == "{node", lines[begin:]))
    names = [line.split()[-1].strip('"};') for line in nodes]
    (initial,) = (name.removeprefix("__init_") for name in names if name.startswith("__init_"))
    states = sorted({name for name in names if not name.startswith("__init_")})
    matrix = {}
    for line in takewhile(lambda line: line.lstrip()[0] == '"', lines[begin + len(nodes) + 1 :]):
        if line.split()[1] != "->":
            continue
        found = EDGE.fullmatch(line.strip())
        assert found, line
        for event in found[3].replace("\\n", " ").split():
            assert (found[1], event) not in matrix
            matrix[found[1], event] = found[2]
    return initial, states, matrix


def test_it_is_the_transition_table_as_tracepoints_show_it() -> None:
    initial, states, matrix = read_as_dot2k(render_rv_dot())
    assert initial == "unknown"
    steps = tracepoint_steps()
    automaton = compile_for(frozenset(step.name for step in steps), TRAITS)
    names = {identifier(name): number for name, number in STATE.items()}
    assert {"unknown", "loaded", "guest", "exited", "unloaded", "left", "woken", "injecting"} == set(states)
    for state in states:
        for step in steps:
            allowed = automaton.verdict[names[state], automaton.classes[step.name]] != ILLEGAL
            after = matrix.get((state, identifier(step.name)))
            assert (after is not None) == bool(allowed), (state, step.name)
            assert after is None or names[after] == automaton.next_state[automaton.classes[step.name]]


def test_what_stands_between_entry_and_exit() -> None:
    _, _, matrix = read_as_dot2k(render_rv_dot())
    assert matrix["guest", "vm_exit"] == "exited"
    assert ("guest", "vm_entry") not in matrix
    assert ("exited", "vm_exit") not in matrix
    assert ("guest", "inject_interrupt") not in matrix
    assert matrix["unloaded", "userspace_exit"] == "left"


def test_names_are_identifiers_of_their_own() -> None:
    _, states, matrix = read_as_dot2k(render_rv_dot())
    events = {event for _, event in matrix}
    assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", name) for name in (*states, *events))
    assert len(events) == len(tracepoint_steps())


def test_the_command_and_graphviz(tmp_path) -> None:
    text = CliRunner().invoke(cli, ["model", "--format", "rv-dot"]).output
    assert text == render_rv_dot()
    assert "// fpu_load: kvm:kvm_fpu with load == 1\n" in text
    if shutil.which("dot") is None:
        pytest.fail("graphviz is missing: make setup")
    subprocess.run(["dot", "-Tsvg", "-o", tmp_path / "x.svg"], input=text, text=True, check=True)
