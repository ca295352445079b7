"""Collecting what the rules found: counts for all of it, details for the first of each rule."""

from __future__ import annotations

import bisect
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
        self.kept: dict[str, list[Violation]] = {rule: [] for rule in self.rules}
        # (rule, part, missing) -> places that could not be checked
        self.skipped: dict[tuple[str, str, tuple[str, ...]], int] = {}
        self.errors: list[str] = []  # of rules of other packages
        self.sequence: Sequence | None = None
        self.event_index: NDArray[np.int64] = np.empty(0, np.int64)
        self.vcpu_ids: dict[int, int] = {}
        self.part_source = ""  # of the part of a rule that is running

    def begin(self, sequence: Sequence, event_index: NDArray[np.int64]) -> None:
        """Say what positions refer to from now on; event_index: row of the table -> of the recording."""
        self.sequence = sequence
        self.event_index = event_index

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
        if not len(positions):
            return
        assert self.sequence is not None
        where = np.asarray(positions, np.intp)
        for i in self._first(rule, self.event_index[self.sequence.row[where]]):
            self.keep(self._violation(rule, int(where[i]), describe(i)))

    def violate_rows(self, rule: str, rows: NDArray[np.intp], describe: Describe) -> None:
        """Report violations at rows of the sequence's table, which the sequence need not hold."""
        self.violated[rule] += len(rows)
        chosen = self._first(rule, self.event_index[rows]) if len(rows) else []
        for draft in self.draft_rows(rule, rows[chosen], lambda i: describe(chosen[i])):
            self.keep(draft)

    def _first(self, rule: str, index: NDArray[np.int64]) -> list[int]:
        """Return which of these events are among the first of the rule that are kept, however the recording is cut."""
        kept, at = self.kept[rule], np.arange(len(index))
        if len(kept) >= self.limit:
            at = at[index < kept[-1].event_index] if kept else at[:0]
        numbers: list[int] = at[np.argsort(index[at], kind="stable")][: self.limit].tolist()
        return numbers

    def keep(self, violation: Violation) -> None:
        """Keep a violation, if it is one of the first ones of its rule."""
        kept = self.kept[violation.rule]
        bisect.insort(kept, violation, key=lambda one: one.event_index)
        del kept[self.limit :]

    @property
    def violations(self) -> list[Violation]:
        """What is kept of all rules, as recorded."""
        return sorted((one for kept in self.kept.values() for one in kept), key=lambda one: one.event_index)

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
        """Count violations, and keep the first ones."""
        self.violated[rule] += len(drafts)
        for violation in drafts:
            self.keep(violation)

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
    # at one event, what the first ones found comes first
    whole.kept = {rule: [] for findings in several for rule, kept in findings.kept.items() if kept}
    for findings in several:
        for kept in findings.kept.values():
            for violation in kept:
                whole.keep(violation)
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
