"""Joins the lines of events that a mail program wrapped, where the joined line reads better than its parts.

Each line stays a line: what was joined to the one before leaves an empty line, so that numbers of lines hold.
"""

from __future__ import annotations

from kvmtrace.formats.ftrace_text.text_fields import told_by
from kvmtrace.formats.ftrace_text.text_lines import HARMLESS, LINE, split_event

MAX_PARTS = 4  # lines that one event may have been wrapped to
MAX_BYTES = 2000


def _event_of(line: str) -> str | None:
    """Return what follows the time stamp of an event's line, None if it is none (but perhaps of lost events)."""
    match = LINE.match(line)
    return match["event"] if match is not None else None


def _is_strange(line: str) -> bool:
    match = LINE.match(line)
    return match is not None and match["other"] is not None and not HARMLESS.match(line.lstrip())


def _reads_better(before: str | None, joined: str) -> bool:
    """Say whether a joined line tells more than its first part, of which `before` is the event if it is one."""
    event = _event_of(joined)
    if event is None:
        return False
    name, body = split_event(event)
    if before is None:
        return bool(name)
    first = split_event(before)
    return name == first[0] and (told_by(name, body) > told_by(*first) or not first[1])


def join_wrapped(text: str) -> str:
    """Return text whose wrapped lines are joined, with as many lines."""
    lines = text.split("\n")
    at = 0
    while at < len(lines) - 1:
        if _is_strange(lines[at + 1]) or _is_strange(lines[at]):
            at += _join_at(lines, at)
        else:
            at += 1
    return "\n".join(lines)


def _join_at(lines: list[str], at: int) -> int:
    """Join to a line those after it that continue it; return how many lines that took."""
    joined, taken = lines[at], 1
    best, best_taken = joined, 1
    while taken < MAX_PARTS and at + taken < len(lines):
        part = lines[at + taken]
        if not part.strip() or _event_of(part) is not None or len(joined) > MAX_BYTES:
            break
        joined, taken = f"{joined.rstrip()} {part.strip()}", taken + 1
        if _reads_better(_event_of(best), joined):
            best, best_taken = joined, taken
    if best_taken > 1:
        lines[at : at + best_taken] = [best, *[""] * (best_taken - 1)]
    return best_taken
