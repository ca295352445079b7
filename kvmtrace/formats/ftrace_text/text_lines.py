"""ftrace as text: lines -> columns of what stands before the event's own text.

Understands `trace` and `trace_pipe` of tracefs (with or without TGID and flags, or in latency format),
`trace-cmd report` (plain, -R, -l, --ts-diff) and `perf script`.

Source: kernel/trace/trace_output.c, trace_print_context(), trace_print_lat_context(); trace-cmd-report(1);
perf-script(1)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Lines of events, as the groups of LINE name them; each piece can match in one way only, so that the time that a
# line takes grows with its length and not faster.
#   ftrace, trace-cmd    task-tid (tgid) [cpu] flags seconds.fraction: (+difference) event: text
#   latency format       task-tid cpu+flags seconds.fraction: event: text, or a count of us in place of the time
#   perf script          (task) pid/tid [cpu] seconds.fraction: period system:event: text
#   perf-prof            task tid flags [cpu] seconds.fraction: system:event: text
# then a line that says that events were lost, and any other
LINE = re.compile(
    r"^(?: *+(?:(?P<task>\S.{0,40}?)(?:-| ++))?(?:(?P<pid>\d{1,10})/)?(?P<tid>\d{1,10}) ++"
    r"(?:\( *+(?P<tgid>\d{1,10}|-++)\) ++)?(?:(?P<early_flags>[.dDbX][.NnpLlBb][.hHsSzZ]\S{1,5}) ++(?=\[))?"
    r"(?:\[(?P<cpu>\d{1,5})\](?P<raw_flags>-0x[0-9a-f]{1,2})?(?: ++(?:(?P<flags>[^\s\d:]\S{2,8}) ++)?|(?=\d{12,19}:))"
    r"|(?P<short_cpu>\d{1,4})(?P<short_flags>[.dDbX][.NnpLlBb]\S{2,6}|-0x[0-9a-f]{1,2}) ++)"
    r"(?P<time>\d{1,19})(?:\.(?P<fraction>\d{1,9})|(?P<us>us)[^\s\w:]? ?)?: ++(?:\(\+?\d{1,18}\) ++)?(?P<event>\S.*)"
    r"|CPU:(?P<lost_cpu>\d{1,5}) \[(?:LOST )?(?:(?P<lost>\d{1,18}) )?EVENTS(?: DROPPED)?\].*"
    r"|(?P<other>\S.*|[^\S\n].*\S.*))$",
    re.MULTILINE,
)
_GROUPS = LINE.groupindex
# what tracefs and trace-cmd print between the events, and what people put around a trace
HARMLESS = re.compile(
    r"#|cpus=\d|version = |=> |<stack trace>|trace-cmd: |CPU \d+ is empty|[0-9a-f]{8,16} \S.*\)$"
    r"|\d+\) .*\||-{5,}$|(?:kernel: )?Dumping ftrace buffer|```|~~~|\{(?:code|noformat)|</?(?:pre|code)>|\[/?code\]"
)
# what people put where they left lines out, and grep between its findings
_AROUND = r"[\[\](){}<>*_ .\u2026-]{0,20}"
_WORD = r"(?:snip|cut|skip|omit|trimm?|remov|elid|truncat)(?:ped|ted|med|ed)?\b"
LEFT_OUT = re.compile(
    rf"{_AROUND}(?:\.{{2,}}|\u2026|\b{_WORD}){_AROUND}$|--$|-+ ?(?:8<|>8|snip|cut)|\[snip"
    rf"|[\[(<]? ?\d{{1,9}} (?:more )?(?:lines|events) (?:left out|{_WORD})",
    re.IGNORECASE,
)
# perf puts a period before the event of older versions, and the system in front of its name
_EVENT = re.compile(r"(?:\d{1,20} ++)?(?:(?P<system>[\w\-]+):)?(?P<name>[\w.\-]+(?::[\w.\-]+)*):(?: ++(?P<text>.*))?$")
_PART_OF_NAME = re.compile(r"\w+$")  # of a line that was cut
_FUNCTION = re.compile(r"[\w.]+ <-")  # the function tracer's lines
_SYSCALL_ENTER = re.compile(r"sys_(\w+)\((.*)\)$")
_SYSCALL_EXIT = re.compile(r"sys_(\w+) -> (.*)$")

# TRACE_FLAG_* bits of the characters of the flags column; irqs, resched, context
_IRQS = {"d": 0x01, "D": 0x81, "b": 0x80, "X": 0x02}
_RESCHED = {"N": 0x24, "n": 0x04, "p": 0x20}
_CONTEXT = {"h": 0x08, "s": 0x10, "H": 0x18, "z": 0x40, "Z": 0x48}
MAX_TID = (1 << 31) - 1
# subsystems that perf writes in front of an event's name
SYSTEMS = frozenset({"kvm", "kvmmmu", "sched", "syscalls", "raw_syscalls", "task", "irq", "timer", "ftrace", "probe"})
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
    strange_at : before which of the lines each of them stands
    gaps : before which of the lines events may be missing: a strange line, or a mark of what was left out, stands there
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
    strange_at: list[int]
    gaps: list[int]


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
    if match is None:
        return ("function" if _FUNCTION.match(text) else "", text)
    name, body = match["name"], (match["text"] or "").rstrip()
    if match["system"] in SYSTEMS:
        return name, body
    return (f"{match['system']}:{name}" if match["system"] else name), body


def _flag_bits(text: str) -> tuple[int, int]:
    """Return (flags, preempt count) of a flags column such as "dNh2."."""
    if text.startswith("-0x"):  # as trace-cmd 3.3 prints them with -R
        return int(text[1:], 16), 0
    if len(text) < 4:
        return NOT_TOLD, 0
    bits = _IRQS.get(text[0], 0) | _RESCHED.get(text[1], 0) | _CONTEXT.get(text[2], 0)
    return bits, int(text[3], 16) if text[3] in "0123456789abcdef" else 0


def _flags(group: dict[str, Sequence[str]]) -> list[tuple[int, int]]:
    """Return (flags, preempt count) of each line."""
    columns = [group[name] for name in ("flags", "short_flags", "early_flags", "raw_flags")]
    known = {text: _flag_bits(text) for text in set().union(*columns)}
    return [known[a or b or c or d] for a, b, c, d in zip(*columns, strict=True)]


def _to_ns(seconds: str, fraction: str, us: str) -> int:
    if us:  # since the beginning of the trace
        return min(int(seconds) * 1000, (1 << 63) - 1)
    if not fraction:  # a clock that only counts: trace_clock counter, x86-tsc
        return min(int(seconds), (1 << 63) - 1)
    return min(int(seconds) * 10**9 + int(fraction.ljust(9, "0")), (1 << 63) - 1)


def decode_lines(text: str) -> Lines:
    """Split whole lines of ftrace text.

    Parameters
    ----------
    text : str, ends at the end of a line
    """
    columns = list(zip(*LINE.findall(text), strict=True)) or [()] * LINE.groups
    group: dict[str, Sequence[str]] = {name: columns[number - 1] for name, number in _GROUPS.items()}
    strange, strange_at, gaps = _others(group["other"])
    if any(group["other"]):
        kept = [i for i, other in enumerate(group["other"]) if not other]
        group = {name: [column[i] for i in kept] for name, column in group.items()}
    events = [split_event(text) for text in group["event"]]
    gaps = sorted({*gaps, *(i for i, (name, text) in enumerate(events) if not name and _PART_OF_NAME.match(text))})
    bits = np.array(_flags(group), np.uint8).reshape(-1, 2)
    times = zip(group["time"], group["fraction"], group["us"], strict=True)
    ts_ns = np.array([_to_ns(*time) if time[0] else -1 for time in times], np.int64)
    lost = np.array([0 if t else int(n or -1) for t, n in zip(group["time"], group["lost"], strict=True)], np.int64)
    cpus = zip(group["cpu"], group["short_cpu"], group["lost_cpu"], strict=True)
    pids = zip(group["pid"], group["tgid"], strict=True)
    return Lines(
        _stamp_losses(ts_ns),
        np.array([min(int(a or b or c), 32767) for a, b, c in cpus], np.int16),
        np.array([min(int(tid), MAX_TID) if tid else -1 for tid in group["tid"]], np.int32),
        np.array([min(int(a or b), MAX_TID) if (a or b).isdigit() else -1 for a, b in pids], np.int32),
        np.where(lost == 0, bits[:, 0], 0).astype(np.uint8),
        bits[:, 1].copy(),
        lost,
        [e[0] for e in events],
        [e[1] for e in events],
        list(group["task"]),
        strange,
        strange_at,
        gaps,
    )


def _others(others: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
    """Return the strange ones among lines that are no events, where they stand, and where events may be missing."""
    strange: list[str] = []
    strange_at: list[int] = []
    gaps: list[int] = []
    n_before = 0
    for i in [i for i, other in enumerate(others) if other]:
        at, n_before = i - n_before, n_before + 1
        text = others[i].lstrip()
        left_out = LEFT_OUT.match(text) is not None
        if not left_out and HARMLESS.match(text):
            continue
        if not left_out:
            strange.append(others[i])
            strange_at.append(at)
        if not gaps or gaps[-1] != at:
            gaps.append(at)
    return strange, strange_at, gaps


def _stamp_losses(ts_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give lines without a time (-1) that of the next line with one, or of the last."""
    known = np.flatnonzero(ts_ns >= 0)
    if not len(known):
        return np.zeros_like(ts_ns)
    at = np.minimum(np.searchsorted(known, np.arange(len(ts_ns))), len(known) - 1)
    return ts_ns[known[at]]
