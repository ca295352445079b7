"""What a recording can show: read from the recording itself, never from a kernel version."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.fpu_on_demand import FPU, is_on_demand
from kvmtrace.isa.registry import BY_NUMBER, ISAS, has_never, run_functions, untraced
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.injection import NOT_TRACED_BESIDE
from kvmtrace.model.states import VCPU_EVENTS
from kvmtrace.table.event_table import TRACE_FLAG_IRQS_NOSUPPORT, TRACE_FLAG_IRQS_OFF

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.table.event_table import EventKind, EventTable
    from kvmtrace.table.recording import Capture


IRQ_FLAGS = "irq_flags"  # the column, as a need of rules
VECTORING = "kvm_exit.vectoring"  # as a need: the field in which the ISA tells an interrupted delivery
_VECTORING_FIELDS = {isa.number: f"kvm_exit.{isa.vectoring_field}" for isa in ISAS if isa.vectoring_field}


@dataclass(frozen=True)
class Capability:
    """What the recording holds.

    Parameters
    ----------
    recorded : events whose absence means that they did not happen
    described : "event" and "event.field" names that the recording can hold
    traits : traits of the recorded kernel (model.transitions.TRAITS)
    exit_irqs_off : True if kvm_exit is traced with interrupts off, None if the recording does not say
    irq_flags : False if no event says whether interrupts were off, as with BPF programs
    exact_errno : errno of kvm_userspace_exit is the raw field, not derived from a tool's words
    seen : events that occurred so far
    filtered : the recorder dropped whole exits on purpose
    not_traced : events that were enabled, and never fired where they would have: this KVM does not trace them
    isas : of the VM-exits so far
    fpu_on_demand : kvm_fpu comes after kvm_userspace_exit, so that it is not judged
    whole_machine : the recorder says that it recorded all threads, not those of a VMM alone
    """

    recorded: frozenset[str] = frozenset()
    described: frozenset[str] = frozenset()
    traits: frozenset[str] = frozenset()
    exit_irqs_off: bool | None = None
    irq_flags: bool = True
    exact_errno: bool = True
    filtered: bool = False
    not_traced: tuple[str, ...] = ()
    seen: frozenset[str] = frozenset()
    isas: frozenset[int] = frozenset()
    fpu_on_demand: bool = False
    whole_machine: bool = False

    def resolve(self, need: str) -> tuple[str, ...]:
        """Return the events and fields, each of them needed, that a need stands for in this recording."""
        if need != VECTORING:
            return (need,)
        return tuple(field for isa, field in _VECTORING_FIELDS.items() if isa in self.isas) or (
            "|".join(_VECTORING_FIELDS.values()),
        )

    def meets(self, need: str) -> bool:
        """Say whether what a rule needs can be in the recording.

        Parameters
        ----------
        need : an event, "event.field", "irq_flags" or VECTORING; "a|b" is met by either
        """
        return all(any(self._has(one) for one in part.split("|")) for part in self.resolve(need))

    def _has(self, need: str) -> bool:
        if need == IRQ_FLAGS:
            return self.irq_flags
        kind, _, name = need.partition(".")
        return kind in self.recorded and (not name or need in self.described)

    def missing(self, needs: Iterable[str]) -> tuple[str, ...]:
        """Return in words which of these needs the recording does not meet: the event, if all of it is missing."""
        lacking = []
        for need in (part for whole in needs for part in self.resolve(whole)):
            if not self.meets(need):
                kinds = list(dict.fromkeys(one.partition(".")[0] for one in need.split("|")))
                whole = not any(kind in self.recorded or kind == IRQ_FLAGS for kind in kinds)
                lacking.append(" or ".join(kinds if whole else need.split("|")))
        return tuple(dict.fromkeys(lacking))

    def cannot_be(self, missing: Iterable[str]) -> bool:
        """Say whether one of what is missing (as `missing` gives it) is what no kernel of the recording's ISA has."""
        return any(all(has_never(self.isas, name) for name in words.split(" or ")) for words in missing)

    def not_shown(self) -> tuple[str, ...]:
        """Say in words what this recording does not show, whatever rules there are."""
        lines = [
            f"{event} never came, although {' and '.join(NOT_TRACED_BESIDE[event])} did: this KVM does not trace it"
            for event in self.not_traced
        ]
        if self.fpu_on_demand:
            lines.append("kvm_fpu is not judged: it comes after kvm_userspace_exit, as in kernels before 4.15")
        if self.filtered:
            lines.append("the recorder left out VM-exits on purpose: nothing is concluded from one to the next")
        if self.exit_irqs_off is None and "kvm_exit" in self.recorded:
            lines.append("V3: without interrupt flags, scheduling in guest mode is not checked")
        if not self.irq_flags and "kvm_entry" in self.recorded:
            lines.append("V3: whether interrupts were off at kvm_entry and kvm_exit is not recorded")
        return tuple(lines)


@dataclass
class Evidence:
    """What has been seen so far of a recording read in parts."""

    seen: set[str]
    isas: set[int] = field(default_factory=set)
    n_kvm_events: int = 0
    exit_irqs_off: bool | None = None
    irq_flags: bool | None = None
    entry_before_run: bool | None = None
    return_before_exit: bool | None = None
    fpu_on_demand: bool | None = None

    def look_at(self, table: EventTable) -> None:
        """Take note of a further part."""
        if self.fpu_on_demand is None:
            self.fpu_on_demand = is_on_demand(table)
        counts = [len(rows) for rows in table.by_kind.rows]
        self.n_kvm_events += int(sum(n for kind, n in zip(table.kinds, counts, strict=True) if n and _of_kvm(kind)))
        self.seen |= {kind.name for kind, count in zip(table.kinds, counts, strict=True) if count}
        if table.has("kvm_exit", "isa") and table.count("kvm_exit"):
            self.isas |= set(np.flatnonzero(np.bincount(table.field("kvm_exit", "isa") & 0xFF)).tolist())
        if self.exit_irqs_off is None:
            self.exit_irqs_off = _exit_irqs_off(table)
        entries = table.rows("kvm_entry")
        if len(entries):
            self.irq_flags = self.irq_flags or not (table.irq_flags[entries] & TRACE_FLAG_IRQS_NOSUPPORT).all()
        if self.entry_before_run is None:
            self.entry_before_run = _precedes(table, "kvm_entry", run_functions())
        if self.return_before_exit is None:
            self.return_before_exit = _returns_first(table)


def _returns_first(table: EventTable) -> bool | None:
    """Say whether a run function returns before kvm_exit is traced."""
    for isa in ISAS:
        if isa.run_function:
            found = _precedes(table, f"{isa.run_function}_return", ("kvm_exit",))
            if found is not None:
                return found
    return None


def _of_kvm(kind: EventKind) -> bool:
    """Say whether KVM itself traces these events, or a probe on one of its functions."""
    return kind.system in ("kvm", "kvmmmu") or kind.name.startswith("kvm_") or kind.name in VCPU_EVENTS


def _exit_irqs_off(table: EventTable) -> bool | None:
    """Say whether kvm_exit is traced with interrupts off, None if that is not known."""
    entries, exits = table.rows("kvm_entry"), table.rows("kvm_exit")
    if not len(exits):
        return None
    if table.has("kvm_exit", "isa"):
        isa = BY_NUMBER.get(int(np.bincount(table.field("kvm_exit", "isa") & 0xFF).argmax()))
        if isa is not None and isa.early_exit_field and table.has("kvm_exit", isa.early_exit_field):
            return True
    off = float(np.mean((table.irq_flags[exits] & TRACE_FLAG_IRQS_OFF) != 0))
    if off > 0.5:
        return True
    known = len(entries) and np.mean((table.irq_flags[entries] & TRACE_FLAG_IRQS_OFF) != 0) > 0.5
    return False if known else None


def _precedes(table: EventTable, kind: str, others: tuple[str, ...]) -> bool | None:
    """Say whether, in threads' own order, `kind` stands directly before `others` more often than after."""
    rows = np.sort(np.concatenate([table.rows(kind), *[table.rows(other) for other in others]]))
    rows = rows[np.argsort(table.tid[rows], kind="stable")][:20_000]
    if not table.count(kind) or len(rows) == table.count(kind):
        return None
    is_kind = table.kind[rows] == table.kind_index[kind]
    close = table.tid[rows[1:]] == table.tid[rows[:-1]]
    gap = np.diff(table.ts_ns[rows])
    kind_first = gap[close & is_kind[:-1] & ~is_kind[1:]]
    kind_last = gap[close & ~is_kind[:-1] & is_kind[1:]]
    if not len(kind_first) or not len(kind_last):
        return None
    return bool(np.median(kind_first) < np.median(kind_last))


# filters that drop whole exits; others (system calls by file descriptor, say) leave the lifecycle intact
EXIT_FILTERS = frozenset({"vcpu", "exit_reason", "sample", "slower_than_ns"})
EDGES_ALONE = "slower_than_ns"  # with it, what KVM traces between a VM-exit and its VM-entry is not recorded
MANY_KINDS = 400  # a file that describes more events than that describes all of a kernel's


def _enabled(capture: Capture, table: EventTable) -> set[str]:
    """Return what was enabled as far as the file says; trace-cmd describes just the events asked for."""
    if capture.events:
        return {name.split(":")[-1] for name in capture.events}
    if capture.format == "trace.dat" and len(table.kinds) < MANY_KINDS:
        return {kind.name for kind in table.kinds if kind.system == "kvm"}
    return set()


def _exit_fields(table: EventTable) -> frozenset[str] | None:
    """Return the recorded fields of kvm_exit, None where that event is not described."""
    index = table.kind_index.get("kvm_exit")
    return None if index is None else frozenset(table.kinds[index].fields)


def _recorded(enabled: set[str], seen: set[str], between: set[str]) -> frozenset[str]:
    """Return the events whose absence means something; `between`: those that a filter let through by chance alone."""
    recorded = (enabled | seen) - between
    if not seen & {"kvm_entry", "kvm_exit"}:  # PVM and the like: enabled, yet no such code path
        recorded -= {"kvm_entry", "kvm_exit"}
    return frozenset(recorded)


def _traits(table: EventTable, evidence: Evidence) -> frozenset[str]:
    traits = {"entry_before_run" if evidence.entry_before_run else "entry_in_run"}
    late = evidence.exit_irqs_off is False
    if evidence.exit_irqs_off is None:
        late = bool(evidence.return_before_exit)
        traits.add("exit_irqs_unknown")
    traits.add("exit_irqs_on" if late else "exit_irqs_off")
    # 5.10 has neither; each of them alone tells a newer kernel
    new = (
        table.has("kvm_entry", "immediate_exit")
        or table.has("kvm_page_fault", "vcpu_id")
        or table.has("kvm_inj_virq", "reinjected")
        or table.has("kvm_nested_vmenter")
    )
    if not new:
        traits.add("old_fastpath")
    if "kvm_nested_vmenter_failed" in evidence.seen and not late:  # traced late, it is traced in any case
        traits.add("refused_nested_entries")
    return frozenset(traits)


def _described(table: EventTable) -> frozenset[str]:
    """Return the names of events and their fields; one whose events came without it is not a field."""
    described: set[str] = set()
    for index, kind in enumerate(table.kinds):
        payload = table.payloads.get(index)
        fields = list(kind.fields)
        if payload is not None:  # what some of its events do not tell is judged of none
            fields = [name for name in fields if name in payload.fields and payload.told(name) is None]
        described.add(kind.name)
        described.update(f"{kind.name}.{name}" for name in fields)
    return frozenset(described).union(
        f"{kind}.{name}" for kind, name in table.derived if table.told(kind, name) is None
    )


def _unjudged(table: EventTable, evidence: Evidence, not_traced: tuple[str, ...]) -> frozenset[str]:
    """Return events whose absence means nothing here."""
    fpu = {FPU} if evidence.fpu_on_demand else set()
    return frozenset(not_traced) | untraced(_exit_fields(table)) | fpu


def find_capability(capture: Capture, table: EventTable, evidence: Evidence) -> Capability:
    """Return what the recording can show, as far as it has been read."""
    filters = [str(name) for name in capture.meta.get("filters") or ()]
    enabled = _enabled(capture, table)
    not_traced = tuple(
        event
        for event, others in NOT_TRACED_BESIDE.items()
        if event in enabled - evidence.seen and evidence.seen.issuperset(others)
    )
    between = {kind.name for kind in table.kinds if kind.system == "kvm"} if EDGES_ALONE in filters else set()
    recorded = _recorded(enabled, evidence.seen, between - {"kvm_entry", "kvm_exit"})
    return Capability(
        # what was enabled under a name that the file does not describe cannot be found in it
        recorded=(recorded - _unjudged(table, evidence, not_traced)) & table.kind_index.keys(),
        not_traced=not_traced,
        described=_described(table),
        traits=_traits(table, evidence),
        exit_irqs_off=evidence.exit_irqs_off,
        irq_flags=evidence.irq_flags is not False,
        exact_errno=not capture.format.startswith("ftrace-text"),
        seen=frozenset(evidence.seen),
        isas=frozenset(evidence.isas),
        fpu_on_demand=bool(evidence.fpu_on_demand),
        whole_machine=(capture.meta.get("target") or {}).get("kind") == "all",
        filtered=any(name in EXIT_FILTERS or name.startswith("kvm:") for name in filters),
    )
