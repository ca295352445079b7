"""ftrace as text: lines -> columns of what stands before the event's own text.

Understands `trace` and `trace_pipe` of tracefs (with or without TGID and flags) and `trace-cmd report`.

Source: kernel/trace/trace_output.c, trace_print_context(), trace_print_lat_fmt(); trace-cmd-report(1)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# task-tid (tgid) [cpu] flags seconds.fraction: text, or a line that says events were lost
LINE = re.compile(
    r"^(?:[ \t]*(\S.{0,40}?)-(\d{1,10})[ \t]+(?:\([ \t]*(\d{1,10}|-+)\)[ \t]+)?\[(\d{1,5})\][ \t]+"
    r"(?:([^\s\d:]\S{2,8})[ \t]+)?(\d{1,19})(?:\.(\d{1,9}))?:[ \t]+(\S.*)"
    r"|CPU:(\d{1,5}) \[(?:LOST )?(?:(\d{1,18}) )?EVENTS(?: DROPPED)?\].*"
    r"|(\S.*))$",
    re.MULTILINE,
)  # the last: anything else
# what tracefs and trace-cmd print between the events
_HARMLESS = re.compile(r"#|cpus=\d|version = |=> |<stack trace>|trace-cmd: |CPU \d+ is empty")
_EVENT = re.compile(r"([\w:.\-]+):(?:[ \t]+(.*))?$")
_SYSCALL_ENTER = re.compile(r"sys_(\w+)\((.*)\)$")
_SYSCALL_EXIT = re.compile(r"sys_(\w+) -> (.*)$")

# TRACE_FLAG_* bits of the characters of the flags column; irqs, resched, context
_IRQS = {"d": 0x01, "D": 0x81, "b": 0x80, "X": 0x02}
_RESCHED = {"N": 0x24, "n": 0x04, "p": 0x20}
_CONTEXT = {"h": 0x08, "s": 0x10, "H": 0x18, "z": 0x40, "Z": 0x48}
NOT_TOLD = 0x02  # TRACE_FLAG_IRQS_NOSUPPORT: the text has no flags


@dataclass
class Lines:
    """Columns of n lines that are events or say that events were lost.

    Parameters
    ----------
    name : str per line, the event; "" for lost events
    body : str per line, the event's own text
    comm : str per line
    lost : int64, shape (n,), events lost before the line's place: 0 for events, -1 if their number is not said
    strange : (line's text) of lines that are neither
    """

    ts_ns: NDArray[np.int64]
    cpu: NDArray[np.int16]
    tid: NDArray[np.int32]
    tgid: NDArray[np.int32]
    irq_flags: NDArray[np.uint8]
    preempt_count: NDArray[np.uint8]
    lost: NDArray[np.int64]
    name: list[str]
    body: list[str]
    comm: list[str]
    strange: list[str]


def split_event(text: str) -> tuple[str, str]:
    """Return (event, its text) of what follows the time stamp; ("", text) if there is no event's name."""
    if text.startswith("sys_"):
        enter = _SYSCALL_ENTER.match(text)
        if enter is not None:
            return f"sys_enter_{enter[1]}", enter[2]
        leave = _SYSCALL_EXIT.match(text)
        if leave is not None:
            return f"sys_exit_{leave[1]}", leave[2]
    match = _EVENT.match(text)
    return (match[1], match[2] or "") if match else ("", text)


def _flag_bits(text: str) -> tuple[int, int]:
    """Return (flags, preempt count) of a flags column such as "dNh2."."""
    if len(text) < 4:
        return NOT_TOLD, 0
    bits = _IRQS.get(text[0], 0) | _RESCHED.get(text[1], 0) | _CONTEXT.get(text[2], 0)
    return bits, int(text[3], 16) if text[3] in "0123456789abcdef" else 0


def _to_ns(seconds: str, fraction: str) -> int:
    if not fraction:  # a clock that only counts: trace_clock counter, x86-tsc
        return min(int(seconds), (1 << 63) - 1)
    return min(int(seconds) * 10**9 + int(fraction.ljust(9, "0")), (1 << 63) - 1)


def decode_lines(text: str) -> Lines:
    """Split whole lines of ftrace text.

    Parameters
    ----------
    text : str, ends at the end of a line
    """
    found = LINE.findall(text)
    strange = [m[10] for m in found if m[10] and not _HARMLESS.match(m[10].lstrip())]
    rows = [m for m in found if not m[10]]
    events = [split_event(m[7]) for m in rows]
    known = {text: _flag_bits(text) for text in {m[4] for m in rows}}
    flags = np.array([known[m[4]] for m in rows], np.uint8).reshape(-1, 2)
    ts_ns = np.array([_to_ns(m[5], m[6]) if m[5] else -1 for m in rows], np.int64)
    lost = np.array([0 if m[5] else int(m[9] or -1) for m in rows], np.int64)
    return Lines(
        _stamp_losses(ts_ns),
        np.array([min(int(m[3] or m[8]), 32767) for m in rows], np.int16),
        np.array([min(int(m[1] or 0), (1 << 31) - 1) if m[5] else -1 for m in rows], np.int32),
        np.array([min(int(m[2]), (1 << 31) - 1) if m[2].isdigit() else -1 for m in rows], np.int32),
        np.where(lost == 0, flags[:, 0], 0).astype(np.uint8),
        flags[:, 1].copy(),
        lost,
        [e[0] for e in events],
        [e[1] for e in events],
        [m[0] for m in rows],
        strange,
    )


def _stamp_losses(ts_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give lines without a time (-1) that of the next line with one, or of the last."""
    known = np.flatnonzero(ts_ns >= 0)
    if not len(known):
        return np.zeros_like(ts_ns)
    at = np.minimum(np.searchsorted(known, np.arange(len(ts_ns))), len(known) - 1)
    return ts_ns[known[at]]
