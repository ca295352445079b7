"""Collecting what the rules found: counts for all of it, details for the first of each rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvmtrace.check.alphabet import EXIT
from kvmtrace.check.verdict import ContextEvent, RuleResult, Violation
from kvmtrace.isa.registry import BY_NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.check.outcomes import Outcome
    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.table.event_table import EventTable

    Words = tuple[str, str] | tuple[str, str, str]
    Describe = Callable[[int], Words]

BEFORE, AFTER = 8, 4  # events of context
MAX_LOOK_BACK = 1 << 16  # VM-exits of all threads


class Told(Protocol):
    """What a finding tells of its rule."""

    @property
    def sentence(self) -> str:
        """What the rule demands."""

    @property
    def severity(self) -> str:
        """VIOLATION or SUSPICION."""

    @property
    def source(self) -> str:
        """KVM's function that the rule was read in, with its file."""

    @property
    def blames_handler(self) -> bool:
        """Say whether the exit's handler may be at fault."""


class Findings:
    """Counts per rule, and up to `limit` violations of each.

    Parameters
    ----------
    rules : id -> rule, of all that may find something
    limit : int, violations kept per rule
    """

    def __init__(self, rules: Mapping[str, Told], limit: int = 20) -> None:
        self.limit = limit
        self.rules = rules
        self.checked: dict[str, int] = dict.fromkeys(self.rules, 0)
        self.violated: dict[str, int] = dict.fromkeys(self.rules, 0)
        self.unknown: dict[str, int] = dict.fromkeys(self.rules, 0)
        self.violations: list[Violation] = []
        self.kept: dict[str, int] = dict.fromkeys(self.rules, 0)
        # (rule, part, missing) -> places that could not be checked
        self.skipped: dict[tuple[str, str, tuple[str, ...]], int] = {}
        self.errors: list[str] = []  # of rules of other packages
        self.sequence: Sequence | None = None
        self.event_index: NDArray[np.int64] = np.empty(0, np.int64)
        self.vcpu_ids: dict[int, int] = {}
        self.part_source = ""  # of the part of a rule that is running
        self.part = 0  # of the recording, from 1
        self.part_of: list[int] = []  # for each of the violations

    def begin(self, sequence: Sequence, event_index: NDArray[np.int64]) -> None:
        """Say what positions refer to from now on; event_index: row of the table -> of the recording."""
        self.sequence = sequence
        self.event_index = event_index
        self.part += 1

    def check(self, rule: str, n_checked: int | np.intp, n_unknown: int | np.intp = 0) -> None:
        """Count places where a rule was checked, or could not be."""
        self.checked[rule] += int(n_checked)
        self.unknown[rule] += int(n_unknown)

    def skip(self, rule: str, part: str, missing: tuple[str, ...], places: int, *, adds: bool) -> None:
        """Count places where a part of a rule was not checked because something is missing."""
        key = rule, part, missing
        self.skipped[key] = self.skipped.get(key, 0) + places
        if adds:
            self.unknown[rule] += places

    def add(self, rule: str, outcome: Outcome, times: int = 1) -> None:
        """Count what a part of a rule found elsewhere, so many times."""
        self.check(rule, outcome.checked * times, outcome.unknown * times)
        if outcome.skipped is not None:
            part, missing, places, adds = outcome.skipped
            self.skip(rule, part, missing, places * times, adds=adds)

    def violate(self, rule: str, positions: NDArray[np.intp] | list[int], describe: Describe) -> None:
        """Report violations at sequence positions; describe(i) gives (expected, observed) of the i-th."""
        self.violated[rule] += len(positions)
        room = self.limit - self.kept[rule]
        for i, position in enumerate(positions[: max(room, 0)]):
            self.violations.append(self._violation(rule, int(position), describe(i)))
            self.part_of.append(self.part)
            self.kept[rule] += 1

    def violate_rows(self, rule: str, rows: NDArray[np.intp], describe: Describe) -> None:
        """Report violations at rows of the sequence's table, which the sequence need not hold."""
        drafts = self.draft_rows(rule, rows[: max(self.limit - self.kept[rule], 0)], describe)
        self.report(rule, drafts)
        self.violated[rule] += len(rows) - len(drafts)

    def draft_rows(self, rule: str, rows: NDArray[np.intp], describe: Describe) -> list[Violation]:
        """Return descriptions of violations at rows, which may be reported later."""
        drafts = []
        for i, row in enumerate(rows.tolist()):
            assert self.sequence is not None
            mine = np.flatnonzero(self.sequence.table.tid == self.sequence.table.tid[row])
            at = int(np.searchsorted(mine, row))
            around = mine[max(at - BEFORE, 0) : at + AFTER + 1].tolist()
            event = self._event_of_row(row)
            context = tuple(map(self._event_of_row, around))
            handler = self._handler(row, self.sequence.table.rows("kvm_exit"), self.sequence.table.tid)
            about = self.vcpu_ids.get(event.tid), handler
            drafts.append(self._described(rule, event, about, context, describe(i)))
        return drafts

    def report(self, rule: str, drafts: list[Violation]) -> None:
        """Count violations, and keep as many as there is room for."""
        self.violated[rule] += len(drafts)
        for violation in drafts[: max(self.limit - self.kept[rule], 0)]:
            self.violations.append(violation)
            self.part_of.append(self.part)
            self.kept[rule] += 1

    def _violation(self, rule: str, position: int, words: Words) -> Violation:
        assert self.sequence is not None
        vcpu_id = self.vcpu_ids.get(self.sequence.key_of(int(self.sequence.thread[position])))
        exits = np.flatnonzero(self.sequence.cls[: position + 1] == EXIT)
        handler = self._handler(position, exits, self.sequence.thread, self.sequence.row)
        return self._described(rule, self._event(position), (vcpu_id, handler), self._context(position), words)

    def _handler(
        self, at: int, exits: NDArray[np.intp], whose: NDArray[Any], row: NDArray[np.intp] | None = None
    ) -> str:
        """Return the handler of the last VM-exit of a thread up to an event, "" if there is none that is known.

        Parameters
        ----------
        at : the event, as `exits` and `whose` count
        exits : ascending, all kvm_exit; whose : the thread of each event; row : the table's row of each, None: itself
        """
        assert self.sequence is not None
        exits = exits[: np.searchsorted(exits, at, side="right")][-MAX_LOOK_BACK:]
        exits = exits[whose[exits] == whose[at]]
        if not len(exits):
            return ""
        table = self.sequence.table
        if not table.has("kvm_exit", "isa") or not table.has("kvm_exit", "exit_reason"):
            return ""
        which = table.position_in_kind[exits[-1] if row is None else row[exits[-1]]]
        # some ISAs' are made of other fields, which an event as it is told has not
        return handler_of(*(int(table.field("kvm_exit", name)[which]) for name in ("isa", "exit_reason")))

    def _source(self, rule: str) -> str:
        """Return KVM's functions that a rule is about, on the ISA of this recording."""
        assert self.sequence is not None
        table = self.sequence.table
        known = table.count("kvm_exit") and table.has("kvm_exit", "isa")
        isa = BY_NUMBER.get(int(table.field("kvm_exit", "isa")[0])) if known else None
        return self.rules[rule].source if isa is None else isa.rule_sources.get(rule, self.rules[rule].source)

    def _described(
        self,
        rule: str,
        event: ContextEvent,
        about: tuple[int | None, str],
        context: tuple[ContextEvent, ...],
        words: Words,
    ) -> Violation:
        """Return a violation; `about`: the vCPU, and the handler of the VM-exit before."""
        vcpu_id, handler = about
        source = words[2] if len(words) > 2 else self.part_source or self._source(rule)
        if handler and self.rules[rule].blames_handler and handler.split(" ", maxsplit=1)[0] not in source:
            source = f"{handler}; {source}"
        return Violation(
            rule=rule,
            severity=self.rules[rule].severity,
            ts_ns=event.ts_ns,
            tid=event.tid,
            vcpu_id=vcpu_id,
            cpu=event.cpu,
            event_index=event.event_index,
            event=event.event,
            expected=words[0],
            observed=words[1],
            why=self.rules[rule].sentence,
            source=source,
            context=context,
        )

    def _event(self, position: int) -> ContextEvent:
        assert self.sequence is not None
        return self._event_of_row(int(self.sequence.row[position]))

    def _event_of_row(self, row: int) -> ContextEvent:
        assert self.sequence is not None
        return context_event(self.sequence.table, row, int(self.event_index[row]))

    def _context(self, position: int) -> tuple[ContextEvent, ...]:
        assert self.sequence is not None
        thread = self.sequence.thread
        around = range(max(position - BEFORE, 0), min(position + AFTER + 1, len(thread)))
        return tuple(self._event(i) for i in around if thread[i] == thread[position])

    def results(self) -> dict[str, RuleResult]:
        """Return the counts; checked == held + violated."""
        return {
            rule: RuleResult(
                max(self.checked[rule], self.violated[rule]),
                max(self.checked[rule] - self.violated[rule], 0),
                self.violated[rule],
                self.unknown[rule],
            )
            for rule in self.rules
        }


def merged(several: tuple[Findings, ...]) -> Findings:
    """Return what several have found in the same parts of a recording, as if the rules of all had taken turns."""
    whole = Findings(several[0].rules, several[0].limit)
    for counts in ("checked", "violated", "unknown"):
        total: dict[str, int] = getattr(whole, counts)
        for findings in several:
            for rule, count in getattr(findings, counts).items():
                total[rule] += count
    for findings in several:
        whole.errors += findings.errors
        for key, places in findings.skipped.items():
            whole.skipped[key] = whole.skipped.get(key, 0) + places
    found = [
        (part, violation)
        for findings in several
        for part, violation in zip(findings.part_of, findings.violations, strict=True)
    ]
    for _, violation in sorted(found, key=lambda one: one[0]):
        if whole.kept[violation.rule] < whole.limit:
            whole.kept[violation.rule] += 1
            whole.violations.append(violation)
    return whole


def handler_of(isa: int | str | None, reason: int | str | None) -> str:
    """Return KVM's function that handles an exit reason, with its file; "" if that is not known."""
    known = BY_NUMBER.get(isa) if isinstance(isa, int) else None
    row = known.exits.get(known.code(reason)) if known is not None and isinstance(reason, int) else None
    return "" if row is None else row.handler


def constant(expected: str, observed: str) -> Describe:
    """Return a description that is the same for every position."""
    return lambda _: (expected, observed)


def context_event(table: EventTable, row: int, event_index: int) -> ContextEvent:
    """Return one row of a table with its fields, as numbers and short texts."""
    kind = table.kinds[table.kind[row]]
    payload = table.payloads.get(int(table.kind[row]))
    own = np.searchsorted(table.rows(kind.name), [row])
    fields: dict[str, int | str] = {}
    for name, dtype in kind.fields.items():
        if payload is None or name not in payload.fields:
            continue
        value = payload.column(name, own)[0]
        if dtype.shape and dtype.base.kind == "u" and dtype.base.itemsize == 1:
            fields[name] = bytes(value).hex()
        elif not dtype.shape and dtype.kind in "iub":
            fields[name] = int(value)
        elif dtype.kind in "SU":
            fields[name] = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return ContextEvent(event_index, int(table.ts_ns[row]), int(table.cpu[row]), int(table.tid[row]), kind.name, fields)
