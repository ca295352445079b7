"""Text as a Recording: `trace`, `trace_pipe`, `trace-cmd report` (plain and -R), `perf script`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.errors import FormatError
from kvmtrace.formats.common.capture_of_file import capture_of
from kvmtrace.formats.common.loss import LossCounter
from kvmtrace.formats.common.metadata import PRINTED_NAMES
from kvmtrace.formats.ftrace_text.disguises import REPEATED, Disguise, decode_text, is_utf16
from kvmtrace.formats.ftrace_text.eras import Era
from kvmtrace.formats.ftrace_text.text_fields import MAX_FORMS, TextKind, decode_bodies
from kvmtrace.formats.ftrace_text.text_gaps import TextGaps
from kvmtrace.formats.ftrace_text.text_lines import Lines, decode_lines
from kvmtrace.formats.ftrace_text.wrapped import join_wrapped
from kvmtrace.isa.probes import PROBES
from kvmtrace.table.event_table import LOST_EVENTS, EventKind, EventTable
from kvmtrace.table.kinds import PROBE_SYSTEM, UNKNOWN_EVENT, lost_events_kind
from kvmtrace.table.payload import ColumnPayload, Payload
from kvmtrace.table.recording import Damage, Loss, Recording

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 16 << 20  # text that is split at once
HEAD_BYTES = 64 << 10
LINE_BYTES = 110  # typical
MAX_STRANGE = 20  # lines that are no events, stated one by one
NO_EVENTS = "no event"  # what Loss.not_understood calls lines between events that are none
MAX_KINDS = 65_000  # event names that one text may have: the table's column of kinds has 16 bits
# trace-cmd and perf pad the names of events to a width, the kernel puts one space behind them
_OF_TRACE_CMD = re.compile(r"^cpus=\d+ *$|: [\w:]{3,30}:  +\S|\] +\d+\.\d+: +(?:\d+ +)?\w+:\w+: ", re.MULTILINE)
# what only the kernel prints, where lines were wrapped and the padding is gone with it
_OF_KERNEL = re.compile(r"\d: [a-z_]{3,16}: \S")
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
        if is_utf16(data):
            data = memoryview(decode_text(bytes(data)).encode())
        self._data = data
        self._path = path
        self._loss = LossCounter()
        self._strange: list[Damage] = []  # of the latest pass
        self._unended: list[Damage] = []
        self._end = self._last_line_end(data)
        self._disguise = Disguise(self._text(0, min(HEAD_BYTES, self._end)))
        self._era = Era()
        self._unread: dict[str, int] = {}  # of the latest pass: event -> texts of it that were not understood
        self._gaps = TextGaps()  # of the latest pass
        self._only_block: tuple[str, str, Lines] | None = None  # what the first pass made, if it is not much
        self._text_kinds = self._find_kinds()
        names = list(self._text_kinds)
        self.partly_told = {name: frozenset(kind.partly) for name, kind in self._text_kinds.items() if kind.partly}
        self.samples = {name: kind.sample for name, kind in self._text_kinds.items() if kind.sample}
        self._index = {name: i for i, name in enumerate(names)}
        self.kinds = (
            *(EventKind(n, system_of(n), k.fields) for n, k in self._text_kinds.items()),
            EventKind(UNKNOWN_EVENT, "", {"text": np.dtype("S")}),
            lost_events_kind(),
        )
        self.comms: dict[int, str] = {}
        self.processes: dict[int, int] = {}
        events = tuple(f"{k.system}:{k.name}" for k in self.kinds[:-2])
        printed = sorted({reason for kind in self._text_kinds.values() for reason in kind.printed})
        meta = {PRINTED_NAMES: printed} if printed else {}
        self.capture = capture_of(path, file_format, meta, events=events)
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

    def _blocks(self, size: int) -> Iterator[tuple[int, str, str]]:
        """Yield the text in blocks of whole lines: offset, as it stands in the file, without its disguise."""
        at = 0
        while at < self._end:
            stop = min(at + size, self._end)
            if stop < self._end:
                newline = bytes(self._data[stop : stop + 65536]).find(b"\n")
                stop = stop + newline + 1 if newline >= 0 else stop
                if self._disguise.doubled:
                    stop = self._behind_repeats(at, stop)
            block = self._text(at, stop)
            yield at, block, self._disguise.clean(block)
            at = stop

    def _behind_repeats(self, at: int, stop: int) -> int:
        """Return where the lines end that are equal to the one that ends at `stop`."""
        at = max(at, stop - 65536)
        begin = self._data[at : stop - 1].tobytes().rfind(b"\n") + 1 + at
        line = self._data[begin:stop]
        while self._data[stop : stop + len(line)] == line and stop + len(line) <= self._end:
            stop += len(line)
        return stop

    def _lines(self, size: int) -> Iterator[tuple[int, str, str, Lines]]:
        """Yield blocks as _blocks does, wrapped lines joined, and their lines."""
        if self._only_block is not None and size >= len(self._only_block[0]):
            block, text, lines = self._only_block
            self._only_block = None
            yield 0, block, text, lines
            return
        for at, block, text in self._blocks(size):
            lines = decode_lines(text)
            if lines.strange:
                joined = join_wrapped(text)
                if joined != text:
                    self._era.of_trace_cmd |= _OF_KERNEL.search(text) is None
                    yield at, block, joined, decode_lines(joined)
                    continue
            yield at, block, text, lines

    def _find_kinds(self) -> dict[str, TextKind]:
        """Return the kinds of the text, each with what any of its events tells; one pass."""
        kinds: dict[str, TextKind] = {}
        for at, block, text, lines in self._lines(BLOCK_BYTES):
            self._era.of_trace_cmd |= _OF_TRACE_CMD.search(text) is not None
            for name, body in zip(lines.name, lines.body, strict=True):
                kind = kinds.get(name)
                if kind is None:
                    if not name or name in (LOST_EVENTS, UNKNOWN_EVENT):
                        continue
                    if len(kinds) >= MAX_KINDS:
                        raise FormatError(self._path, at, f"at most {MAX_KINDS:,} event names", "more of them")
                    kind = kinds[name] = TextKind(name, self._era)
                kind.see(body)
            if not at and len(block) >= self._end - 8:
                self._only_block = block, text, lines
        for kind in kinds.values():
            kind.finish()
        return kinds

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
        self._unread = {}
        self._gaps = TextGaps()
        n_blocks = 0
        for at, block, text, lines in self._lines(size):
            n_blocks += 1
            self._note_strange(lines.strange, at, block, text)
            self._loss.add_repeated(text.count(REPEATED))
            self.read_share = min((at + len(block)) / max(self._end, 1), 1.0)
            yield self._table(self._gaps.mark(lines))
        if not n_blocks:
            yield self._table(decode_lines(""))

    def _note_strange(self, strange: list[str], at: int, block: str, text: str) -> None:
        """Remember where lines stand that were not understood, up to MAX_STRANGE of them."""
        begin = offset = 0
        for line in strange[: max(MAX_STRANGE - len(self._strange), 0)]:
            place = text.index(line, begin)
            for _ in range(text.count("\n", begin, place)):  # both have the same lines
                offset = block.index("\n", offset) + 1
            begin = place
            where = at + len(block[:offset].encode())  # up to the first byte that is not UTF-8
            self._strange.append(Damage(where, None, "a line of ftrace text", repr(line.strip()[:60])))

    def _table(self, lines: Lines) -> EventTable:
        unknown, lost = len(self.kinds) - 2, len(self.kinds) - 1
        kind = np.array([self._index.get(n, unknown) for n in lines.name], np.uint16)
        kind[lines.lost != 0] = lost
        payloads: dict[int, Payload] = {}
        order = np.argsort(kind, kind="stable")
        found, begins = np.unique(kind[order], return_index=True)
        for index, rows in zip(found.tolist(), np.split(order, begins[1:]), strict=False):
            payloads[index] = self._payload(lines, index, rows)
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

    def _payload(self, lines: Lines, index: int, rows: Any) -> Payload:
        if index == len(self.kinds) - 1:
            return ColumnPayload({"count": lines.lost[rows]})
        bodies = [lines.body[i] for i in rows.tolist()]
        if index == len(self.kinds) - 2:
            self._unread[NO_EVENTS] = self._unread.get(NO_EVENTS, 0) + len(rows)
            return ColumnPayload({"text": np.array([b.encode() for b in bodies], "S")})
        name = self.kinds[index].name
        text = self._text_kinds[name]
        decoded = decode_bodies(text, bodies)
        if decoded.unread:
            name += f" (whose text has more than {MAX_FORMS} forms)" if text.crowded else ""
            self._unread[name] = self._unread.get(name, 0) + len(decoded.unread)
        return ColumnPayload(decoded.columns, decoded.told)

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
        damage = (*self._strange, *self._unended)
        unread = dict(self._unread)
        if self._gaps.not_understood:
            unread[NO_EVENTS] = unread.get(NO_EVENTS, 0) + self._gaps.not_understood
        self.loss = Loss(known.events, known.by_cpu, self._cut, damage, known.repeated, unread)


def open_text(data: memoryview, path: str) -> TextRecording:
    """Open text of a trace.

    Raises
    ------
    FormatError
        No line of it is an event.
    """
    recording = TextRecording(data, path)
    if len(recording.kinds) == 2 and not bytes(data[:9]) == b"# tracer:":
        raise FormatError(path, 0, "a line of ftrace text", "none")
    return recording


_FEW_ZEROS = 8  # more than one byte in so many is no text


def looks_like_text(head: bytes) -> bool:
    """Say whether a file that begins with `head` may be the text of a trace."""
    # a log whose file system lost what was written last has some; lines with them count as not understood
    if head.count(b"\0") * _FEW_ZEROS > len(head) and not is_utf16(head):
        return False
    text = decode_text(head)
    text = Disguise(text).clean(text)
    if text.startswith("# tracer:"):
        return True
    lines = decode_lines(text)
    if lines.strange and not len(lines.name):
        lines = decode_lines(join_wrapped(text))
    return any(lines.name) or bool((lines.lost != 0).any())
