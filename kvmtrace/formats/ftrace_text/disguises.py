"""Undoes what mail, editors and web pages do to the lines of a trace. Each line stays one line.

Line ends of Windows, a byte-order mark, tabs, colours of a terminal, `> ` of quotes, HTML's entities, and what stands
in front of the lines: numbers, or the time stamps of a log. Two logs of one console have each line twice.
Quoted-printable is what a mail's source has: a line of it goes on behind "=". Lines that a mail program wrapped are
joined in wrapped.py, which has to know what an event looks like.
"""

from __future__ import annotations

import html
import re
from itertools import groupby, pairwise

_QUOTE = re.compile(r"^ *+>[> ]*+", re.MULTILINE)
# "12  ", "12: ", "12| ", "12) " in front of a line; a time stamp has digits behind its point
_NUMBER = re.compile(r"^ *+(\d{1,9}) *+(?:[:|).] *+| (?! *+\[))(?=\S)", re.MULTILINE)
# what logs put in front: "Nov 27 19:58:34 host name[12]: ", "2026-11-27T19:58:34.123+0100 host name: ", a date and
# time alone, "[   12.345678] " of the kernel's log
_LOGGED = re.compile(
    r"^ *+(?:(?:[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d(?:\.\d{1,9})?"
    r"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?)"
    r"(?: [\w.-]{1,64} [^\s:\[]{1,40}(?:\[\d{1,10}\])?:)?"
    r"|(?:<\d{1,3}>)?\[ *\d{1,10}\.\d{6}\](?:\[ *[TC]\d{1,10}\])?) ",
    re.MULTILINE,
)
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ENCODED = re.compile(r"=([0-9A-F]{2})")
# where quoted-printable has it for itself, and where it is none: beside white space and what is no ASCII
_EQUALS, _PLAIN_EQUALS = re.compile("=3D"), re.compile(r"=(?!3D|20|09|A0|[89A-F][0-9A-F]|\r?$)", re.MULTILINE)
REPEATED = "\x1e"  # in place of an event's line that is the one before once more
_FEWEST_REPEATED = 4  # lines, each twice, before it can be no accident
JOINED = "\x1f"  # in place of a line that was joined to the one before: white space that no text has
_NUMBERED_LINES = 3  # in a row with ascending numbers make them numbers of lines
_LOOKED_AT = 40
_ENTITIES = ("&gt;", "&lt;", "&amp;", "&#", "&nbsp;", "&quot;")
_SPACES = str.maketrans({"\t": " ", "\xa0": " ", "\ufeff": None})


def decode_text(data: bytes) -> str:
    """Return bytes as text: UTF-8, or UTF-16 with its byte-order mark as Windows' shells write it."""
    if is_utf16(data):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8", "replace")


def is_utf16(data: bytes | memoryview) -> bool:
    """Say whether bytes begin with the byte-order mark of UTF-16."""
    return bytes(data[:2]) in (b"\xff\xfe", b"\xfe\xff")


class Disguise:
    """How the lines of one text are cleaned.

    Parameters
    ----------
    head : str, its beginning; whether lines are numbered is seen there
    """

    def __init__(self, head: str) -> None:
        self._numbered = self._logged = self.doubled = False
        self._encoded = "=" in head and _is_quoted_printable(head)
        lines = [line for line in self.clean(head).split("\n") if line.strip()][:_LOOKED_AT]
        self._logged = sum(_LOGGED.match(line) is not None for line in lines) * 2 > len(lines)
        found = [_NUMBER.match(line) for line in lines]
        numbers = [int(match[1]) for match in found if match]
        ascending = all(a < b for a, b in pairwise(numbers))
        self._numbered = ascending and len(numbers) >= max(_NUMBERED_LINES, len(lines) - 2)
        self.doubled = _each_twice(self.clean(head))

    def clean(self, text: str) -> str:
        """Return text with as many lines, without what does not belong to them."""
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "")
        if self._encoded:
            text = _decode_quoted_printable(text)
        if "\x1b" in text:
            text = _COLOUR.sub("", text)
        if "\t" in text or "\xa0" in text or "\ufeff" in text:
            text = text.translate(_SPACES)
        if any(entity in text for entity in _ENTITIES):
            text = html.unescape(text).replace("\xa0", " ")
        if text.startswith((">", " ")) or "\n>" in text or "\n >" in text:
            text = _QUOTE.sub("", text)
        if self._logged:
            text = _LOGGED.sub("", text)
        text = _NUMBER.sub("", text) if self._numbered else text
        return _once(text) if self.doubled else text


def _each_twice(head: str) -> bool:
    """Say whether each line of a text's beginning stands there twice, one behind the other."""
    lines = [line for line in head.split("\n")[:-1] if line.strip()]  # the last one may be cut
    counts = [sum(1 for _ in same) for _, same in groupby(lines)][:-1]
    return len(counts) >= _FEWEST_REPEATED and all(count % 2 == 0 for count in counts)


def _once(text: str) -> str:
    """Return text with as many lines, every second one of equal lines left out."""
    lines: list[str] = []
    for line, same in groupby(text.split("\n")):
        n = sum(1 for _ in same)
        again = REPEATED if ": " in line else ""  # others are no events
        lines += [again if i % 2 else line for i in range(n)]
    return "\n".join(lines)


def _is_quoted_printable(head: str) -> bool:
    """Say whether text is encoded as quoted-printable: by a mail's header, long lines that end in "=", or =3D alone."""
    if len(_EQUALS.findall(head)) >= _NUMBERED_LINES and not _PLAIN_EQUALS.search(head):
        return True
    if "=\n" not in head.replace("\r", ""):
        return False
    if "quoted-printable" in head.lower():
        return True
    ends = [line for line in head.splitlines() if line.endswith("=")]
    return len(ends) >= _NUMBERED_LINES and all(_SHORTEST <= len(line) <= _LONGEST for line in ends)


# lines of quoted-printable that go on
_SHORTEST, _LONGEST = 60, 76


def _decode_quoted_printable(text: str) -> str:
    """Return text decoded, with as many lines: what continued a line leaves JOINED behind it."""
    lines: list[str] = []
    joined = 0
    for line in text.split("\n"):
        if joined:
            lines[-1] += line
        else:
            lines.append(line)
        if lines[-1].endswith("="):
            lines[-1] = lines[-1][:-1]
            joined += 1
        else:
            lines += [JOINED] * joined
            joined = 0
    lines += [JOINED] * max(joined - 1, 0)
    return _ENCODED.sub(lambda match: chr(int(match[1], 16)), "\n".join(lines))
