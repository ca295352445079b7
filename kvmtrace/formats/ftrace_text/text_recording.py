"""Ftrace text as a Recording: `trace`, `trace_pipe`, `trace-cmd report` (plain and -R)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.errors import FormatError
from kvmtrace.formats.common.capture_of_file import capture_of
from kvmtrace.formats.common.loss import LossCounter
from kvmtrace.formats.ftrace_text.text_fields import TextKind, choose_text_kind, decode_bodies
from kvmtrace.formats.ftrace_text.text_lines import LINE, Lines, decode_lines, split_event
from kvmtrace.kvm.tracepoints import PROBES
from kvmtrace.table.event_table import LOST_EVENTS, EventKind, EventTable
from kvmtrace.table.kinds import PROBE_SYSTEM, UNKNOWN_EVENT, lost_events_kind
from kvmtrace.table.payload import ColumnPayload, Payload
from kvmtrace.table.recording import Damage, Recording

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 16 << 20  # text that is split at once
LINE_BYTES = 110  # typical
MAX_STRANGE = 20  # lines that are no events, stated one by one
_HEAD = re.compile(r"\b\d+(?:\.\d+)?: +(\S[^\n]{0,400})")
_SYSTEMS = {"sched_": "sched", "sys_": "syscalls", "kvm_mmu_": "kvmmmu", "kvm_": "kvm", "vcpu_": "kvm"}


def system_of(name: str) -> str:
    """Return the subsystem of an event by its name: text does not say it."""
    if name in PROBES:
        return PROBE_SYSTEM
    return next((system for prefix, system in _SYSTEMS.items() if name.startswith(prefix)), "")


class TextRecording(Recording):
    """Events of ftrace text.

    Parameters
    ----------
    data : memoryview of bytes, the text
    path : str
    file_format : str, see Capture
    meta, comms : what a file around the text said
    """

    def __init__(self, data: memoryview, path: str, file_format: str = "ftrace-text") -> None:
        self._data = data
        self._loss = LossCounter()
        self._strange: list[Damage] = []  # of the latest pass
        self._unended: list[Damage] = []
        self._end = self._last_line_end(data)
        self._of_trace_cmd = re.search(r"^cpus=\d+\s*$", self._text(0, min(4096, self._end)), re.MULTILINE) is not None
        self._text_kinds = self._find_kinds()
        names = list(self._text_kinds)
        self._index = {name: i for i, name in enumerate(names)}
        self.kinds = (
            *(EventKind(n, system_of(n), k.fields) for n, k in self._text_kinds.items()),
            EventKind(UNKNOWN_EVENT, "", {"text": np.dtype("S")}),
            lost_events_kind(),
        )
        self.comms: dict[int, str] = {}
        self.processes: dict[int, int] = {}
        events = tuple(f"{k.system}:{k.name}" for k in self.kinds[:-2])
        self.capture = capture_of(path, file_format, {}, events=events)
        self._events: EventTable | None = None
        self._update_loss()

    def _last_line_end(self, data: memoryview) -> int:
        """Return where the last whole line ends: half a line may hold half a number."""
        tail = bytes(data[-65536:])
        end = len(data) - (len(tail) - 1 - tail.rfind(b"\n"))
        if end < len(data):
            found = bytes(data[end : end + 60]).decode("utf-8", "replace")
            self._unended.append(Damage(end, None, "a line that ends", repr(found)))
            self._cut = True
        else:
            self._cut = False
        return end

    def _text(self, first: int, last: int) -> str:
        return bytes(self._data[first:last]).decode("utf-8", "replace")

    def _blocks(self, size: int) -> Iterator[tuple[int, str]]:
        """Yield the text in blocks of whole lines, each with its offset."""
        at = 0
        while at < self._end:
            stop = min(at + size, self._end)
            if stop < self._end:
                newline = bytes(self._data[stop : stop + 65536]).find(b"\n")
                stop = stop + newline + 1 if newline >= 0 else stop
            yield at, self._text(at, stop)
            at = stop

    def _find_kinds(self) -> dict[str, TextKind]:
        """Return the kinds of the text by their first event, one pass with a small pattern."""
        first: dict[str, str] = {}
        for _, block in self._blocks(BLOCK_BYTES):
            for text in _HEAD.findall(block):
                name, body = split_event(text)
                if name and name not in first:
                    first[name] = body
        return {
            name: choose_text_kind(name, body, of_trace_cmd=self._of_trace_cmd)
            for name, body in first.items()
            if name not in (LOST_EVENTS, UNKNOWN_EVENT)
        }

    def events(self) -> EventTable:
        """Return all events (cached)."""
        if self._events is None:
            tables = list(self._tables(BLOCK_BYTES))
            self._events = EventTable.concat(tables) if len(tables) != 1 else tables[0]
        return self._events

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield tables of about `max_events` consecutive rows."""
        yield from self._tables(min(max(max_events * LINE_BYTES, 1), 1 << 30))

    def _tables(self, size: int) -> Iterator[EventTable]:
        self._loss.restart()
        self._strange = []
        n_blocks = 0
        for at, block in self._blocks(size):
            n_blocks += 1
            lines = decode_lines(block)
            self._note_strange(lines.strange, at, block)
            yield self._table(lines)
        if not n_blocks:
            yield self._table(decode_lines(""))

    def _note_strange(self, strange: list[str], at: int, block: str) -> None:
        """Remember where lines stand that were not understood, up to MAX_STRANGE of them."""
        begin = 0
        for line in strange[: max(MAX_STRANGE - len(self._strange), 0)]:
            begin = block.index(line, begin)
            offset = at + len(block[:begin].encode())  # up to the first byte that is not UTF-8
            self._strange.append(Damage(offset, None, "a line of ftrace text", repr(line[:60])))
            begin += len(line)

    def _table(self, lines: Lines) -> EventTable:
        unknown, lost = len(self.kinds) - 2, len(self.kinds) - 1
        kind = np.array([self._index.get(n, unknown) for n in lines.name], np.uint16)
        kind[lines.lost != 0] = lost
        payloads: dict[int, Payload] = {}
        for index in np.unique(kind).tolist():
            rows = np.flatnonzero(kind == index)
            payloads[index] = ColumnPayload(self._columns(lines, index, rows))
        self._note(lines)
        columns: dict[str, Any] = {
            "ts_ns": lines.ts_ns,
            "cpu": lines.cpu,
            "tid": lines.tid,
            "kind": kind,
            "irq_flags": lines.irq_flags,
            "preempt_count": lines.preempt_count,
        }
        return EventTable(columns, self.kinds, payloads)

    def _columns(self, lines: Lines, index: int, rows: Any) -> dict[str, Any]:
        if index == len(self.kinds) - 1:
            return {"count": lines.lost[rows]}
        bodies = [lines.body[i] for i in rows.tolist()]
        if index == len(self.kinds) - 2:
            return {"text": np.array([b.encode() for b in bodies], "S")}
        return decode_bodies(self._text_kinds[self.kinds[index].name], bodies)

    def _note(self, lines: Lines) -> None:
        """Remember threads and losses."""
        gone = lines.lost != 0
        self._loss.add_lost(lines.cpu[gone], lines.lost[gone])
        tids = lines.tid.tolist()
        self.comms.update((t, c) for t, c in zip(tids, lines.comm, strict=True) if c and c != "<...>")
        self.processes.update((t, p) for t, p in zip(tids, lines.tgid.tolist(), strict=True) if p >= 0)
        self._update_loss()

    def _update_loss(self) -> None:
        known = self._loss.loss()
        self.loss = type(known)(known.events, known.by_cpu, self._cut, (*self._strange, *self._unended))


def open_text(data: memoryview, path: str) -> TextRecording:
    """Open ftrace text.

    Raises
    ------
    FormatError
        No line of it is an event.
    """
    recording = TextRecording(data, path)
    if len(recording.kinds) == 2 and not bytes(data[:9]) == b"# tracer:":
        raise FormatError(path, 0, "a line of ftrace text", "none")
    return recording


def looks_like_text(head: bytes) -> bool:
    """Say whether a file that begins with `head` may be ftrace text."""
    if b"\0" in head:
        return False
    text = head.decode("utf-8", "replace")
    return text.startswith("# tracer:") or any(m[6] or m[9] for m in LINE.finditer(text))
