"""The lifecycle as a picture: the transition table grouped into edges, as Graphviz DOT or as SVG.

Nothing is drawn that the table does not say. Edges that leave every state of the run loop alike are drawn
once, from a hub that stands for "the next pass of vcpu_run"; their counts are the sums over those states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import BY_NAME, run_functions
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.states import STATES, STEPS
from kvmtrace.model.transitions import TRANSITIONS, Transition

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HUB = "loop"  # not a state: where the states of the run loop meet

# (state, event, next state) -> how often a recording took that transition
Counts = dict[tuple[str, str, str], int]

# rows that only hardware or kernels of the past, or failing VM-entries, exercise
_RARE_GUARDS = frozenset({"init_reset", "other_ioctl", "entry_failed", "early_error"})
_RARE_TRAITS = frozenset({"entry_before_run", "old_fastpath", "refused_nested_entries"})


@dataclass(frozen=True)
class Edge:
    """All transitions drawn as one arrow.

    Parameters
    ----------
    source, target : str, states; source may be HUB
    transitions : the rows of the table that it stands for
    count : int, how often they were taken; None without a recording
    details : (source state, event, count) of each transition that was taken
    """

    source: str
    target: str
    transitions: tuple[Transition, ...]
    count: int | None = None
    details: tuple[tuple[str, str, int], ...] = ()

    @property
    def events(self) -> tuple[str, ...]:
        """The events that take this edge, in the order of the table."""
        return tuple(dict.fromkeys(row.event for row in self.transitions))

    @property
    def rare(self) -> bool:
        """Whether the edge belongs to failures, or to hardware and kernels of the past."""
        return all(row.guard in _RARE_GUARDS or row.only in _RARE_TRAITS or _mpx(row) for row in self.transitions)

    @property
    def optional(self) -> bool:
        """Whether only probes and system-call tracers show it, whose absence proves nothing."""
        return all(STEPS[name].optional for name in self.events)


def _mpx(row: Transition) -> bool:
    """Say whether a row swaps the FPU outside KVM_RUN's bracket, as only hosts with MPX do."""
    return row.event == "FPU load" and row.state != "run_called"


def _rows(isa: str | None) -> list[Transition]:
    one = BY_NAME.get(isa or "")
    if one is None:
        return list(TRANSITIONS)
    others = {*run_functions(), *run_functions("_return")} - {one.run_function, f"{one.run_function}_return"}
    rows = [row for row in TRANSITIONS if STEPS[row.event].kind not in others]
    # no run function returns before kvm_exit where that is traced with interrupts off, as by the kernels of today
    return [row for row in rows if not (one.early_exit_field and "switched_out" in {row.state, row.next})]


def loop_states() -> frozenset[str]:
    """Return the states that every pass of the run loop may start from: those of most VM-entries."""
    return frozenset(row.state for row in TRANSITIONS if row.event == "FPU unload" and not row.guard)


def _shared(rows: Iterable[Transition]) -> set[tuple[str, str]]:
    """Return the (event, next state) pairs that all states of the run loop have."""
    sources: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        sources.setdefault((row.event, row.next), set()).add(row.state)
    loop = loop_states()
    return {pair for pair, states in sources.items() if states >= loop}


def group_edges(counts: Mapping[tuple[str, str, str], int] | None = None, isa: str | None = None) -> list[Edge]:
    """Return the arrows to draw, each with the rows it stands for and, given counts, their sum.

    Parameters
    ----------
    counts : (state, event, next state) -> how often; transitions the table lacks get an arrow of their own
    isa : name of an ISA, to leave out the others' events; None for all
    """
    rows = _rows(isa)
    shared, loop = _shared(rows), loop_states()
    groups: dict[tuple[str, str], list[Transition]] = {}
    for row in rows:
        hub = (row.event, row.next) in shared and row.state in loop
        groups.setdefault((HUB if hub else row.state, row.next), []).append(row)
    known = {(row.state, row.event, row.next) for row in rows}
    for state, event, next_state in counts or {}:
        if (state, event, next_state) not in known and state in STATES and next_state in STATES:
            extra = Transition(state, event, next_state, "", "From a state that the recording did not show.")
            groups.setdefault((state, next_state), []).append(extra)
    return [_edge(source, target, members, counts) for (source, target), members in groups.items()]


def _edge(
    source: str, target: str, members: list[Transition], counts: Mapping[tuple[str, str, str], int] | None
) -> Edge:
    if counts is None:
        return Edge(source, target, tuple(members))
    taken = tuple(
        (row.state, row.event, counts[row.state, row.event, row.next])
        for row in members
        if counts.get((row.state, row.event, row.next))
    )
    return Edge(source, target, tuple(members), sum(count for _, _, count in taken), taken)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _dot_edge(edge: Edge) -> str:
    label = "\n".join(edge.events) + ("" if edge.count is None else f"\n{edge.count:,}")
    style = "dashed" if edge.rare else "solid"
    colour = ', color="#999999", fontcolor="#999999"' if edge.count == 0 else ""
    return f"  {edge.source} -> {edge.target} [label={_quote(label)}, style={style}{colour}];"


def render_dot(counts: Mapping[tuple[str, str, str], int] | None = None, isa: str | None = None) -> str:
    """Return the lifecycle as Graphviz DOT text, states as nodes and events as edge labels."""
    edges = group_edges(counts, isa)
    drawn = {name for edge in edges for name in (edge.source, edge.target)} - {HUB}
    lines = [
        "digraph lifecycle {",
        "  rankdir=TB;",
        '  node [shape=box, style=rounded, fontname="sans-serif"];',
        '  edge [fontname="sans-serif", fontsize=10];',
        "  subgraph cluster_loop {",
        '    label="run loop (vcpu_run)"; style=rounded;',
        f'    {HUB} [shape=circle, label="next\\npass"];',
    ]
    lines += [f"    {name};" for name in STATES if name in loop_states()]
    lines += [f"    {name} -> {HUB} [style=dotted, arrowhead=none];" for name in STATES if name in loop_states()]
    lines.append("  }")
    lines += [f"  {name} [tooltip={_quote(state.sentence)}];" for name, state in STATES.items() if name in drawn]
    lines += [_dot_edge(edge) for edge in edges]
    return "\n".join([*lines, "}", ""])
