"""Undoes what mail, editors and web pages do to the lines of a trace. Each line stays one line.

Line ends of Windows, a byte-order mark, tabs, `> ` of quotes, HTML's entities, and numbers in front of the lines.
Lines that a mail program wrapped are joined in wrapped.py, which has to know what an event looks like.
"""

from __future__ import annotations

import html
import re
from itertools import pairwise

_QUOTE = re.compile(r"^ *+>[> ]*+", re.MULTILINE)
# "12  ", "12: ", "12| ", "12) " in front of a line; a time stamp has digits behind its point
_NUMBER = re.compile(r"^ *+(\d{1,9}) *+(?:[:|).] *+| (?! *+\[))(?=\S)", re.MULTILINE)
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
        self._numbered = False
        lines = [line for line in self.clean(head).split("\n") if line.strip()][:_LOOKED_AT]
        found = [_NUMBER.match(line) for line in lines]
        numbers = [int(match[1]) for match in found if match]
        ascending = all(a < b for a, b in pairwise(numbers))
        self._numbered = ascending and len(numbers) >= max(_NUMBERED_LINES, len(lines) - 2)

    def clean(self, text: str) -> str:
        """Return text with as many lines, without what does not belong to them."""
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "")
        if "\t" in text or "\xa0" in text or "\ufeff" in text:
            text = text.translate(_SPACES)
        if any(entity in text for entity in _ENTITIES):
            text = html.unescape(text).replace("\xa0", " ")
        if text.startswith((">", " ")) or "\n>" in text or "\n >" in text:
            text = _QUOTE.sub("", text)
        return _NUMBER.sub("", text) if self._numbered else text
