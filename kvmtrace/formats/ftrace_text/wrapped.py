"""Joins the lines of events that a mail program wrapped, where the joined line reads better than its parts.

Each line stays a line: what was joined to the one before leaves an empty line, so that numbers of lines hold.
"""

from __future__ import annotations

from kvmtrace.formats.ftrace_text.disguises import JOINED
from kvmtrace.formats.ftrace_text.text_fields import told_by
from kvmtrace.formats.ftrace_text.text_lines import HARMLESS, LEFT_OUT, LINE, split_event
from kvmtrace.formats.ftrace_text.text_patterns import PATTERNS

MAX_PARTS = 4  # lines that one event may have been wrapped to
MAX_BYTES = 2000
NARROWEST = 60  # characters; no mail program wraps earlier


def _event_of(line: str) -> str | None:
    """Return what follows the time stamp of an event's line, None if it is none (but perhaps of lost events)."""
    match = LINE.match(line)
    return match["event"] if match is not None else None


def _begins_event(line: str) -> bool:
    """Say whether a line is an event's, perhaps wrapped where its name begins."""
    return _event_of(line) is not None or (
        line.rstrip().endswith(":") and _event_of(f"{line.rstrip()} name") is not None
    )


def _is_strange(line: str) -> bool:
    match = LINE.match(line)
    if match is None or match["other"] is None:
        return False
    return not HARMLESS.match(line.lstrip()) and not LEFT_OUT.match(line.lstrip())


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


def _was_wrapped(last: str, joined: str, part: str) -> bool:
    """Say whether an event of which nothing but its text is known goes on in a line, as its first word had no room.

    Parameters
    ----------
    last : the line above
    joined : the event's line, with what was joined to it
    part : the line
    """
    event = _event_of(joined)
    if event is None or split_event(event)[0] in PATTERNS:
        return False
    return len(last.rstrip()) + 1 + len(part.split(maxsplit=1)[0]) > NARROWEST


def join_wrapped(text: str) -> str:
    """Return text whose wrapped lines are joined, with as many lines."""
    lines = text.split("\n")
    at = 0
    while at < len(lines) - 1:
        if _is_strange(lines[_next(lines, at)]) or _is_strange(lines[at]):
            at += _join_at(lines, at)
        else:
            at += 1
    return "\n".join(lines)


def _next(lines: list[str], at: int) -> int:
    """Return where the line behind one stands that a mail's encoding did not join to it."""
    behind = at + 1
    while lines[behind] == JOINED and behind < len(lines) - 1:
        behind += 1
    return behind


def _join_at(lines: list[str], at: int) -> int:
    """Join to a line those after it that continue it; return how many lines that took."""
    joined, taken, parts = lines[at], 1, 1
    best, best_taken = joined, 1
    while parts < MAX_PARTS and at + taken < len(lines):
        part = lines[at + taken]
        if part == JOINED:
            taken += 1
            continue
        if not part.strip() or _begins_event(part) or len(joined) > MAX_BYTES:
            break
        continues = _was_wrapped(lines[at + taken - 1], joined, part)
        joined, taken, parts = f"{joined.rstrip()} {part.strip()}", taken + 1, parts + 1
        if continues or _reads_better(_event_of(best), joined):
            best, best_taken = joined, taken
    if best_taken > 1:
        lines[at : at + best_taken] = [best, *[""] * (best_taken - 1)]
    return best_taken
