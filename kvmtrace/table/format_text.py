"""The kernel's `format` files: text -> where the fields of an event lie. Data: nothing is evaluated.

Source: kernel/trace/trace_events.c, f_show(); Documentation/trace/events.rst, "Event formats"
"""

from __future__ import annotations

import functools
import re
import string
from typing import Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass

# each piece can match in one way only: the time that a text takes grows with its length and not faster
_NAME = re.compile(r"^name:[ \t]*+(\S++)", re.MULTILINE)
_ID = re.compile(r"^ID:[ \t]*+(\d{1,9})[ \t\r]*+$", re.MULTILINE)
_FIELD = re.compile(
    r"^[ \t]*+field(?: special)?:[ \t]*+([^;\n]++);\s*+offset:\s*+(\d{1,9});\s*+size:\s*+(\d{1,9});"
    r"(?:\s*+signed:\s*+(\d{1,9});)?",
    re.MULTILINE,
)
_PRINT = re.compile(r"^print fmt:\s*+(.*)", re.MULTILINE | re.DOTALL)
_BITS = re.compile(r"^[ \t]*+(\w++)[ \t]*+:[ \t]*+(\d{1,9}) bits?", re.MULTILINE)
_TYPES = re.compile(r"^[ \t]*+(padding|time_extend|time_stamp)[ \t]*+:[ \t]*+type == (\d{1,9})", re.MULTILINE)
_WORD = string.ascii_letters + string.digits + "_"

_CHARS = frozenset({"char", "const char", "unsigned char", "signed char"})
_TYPE_SIZES = {
    "char": 1,
    "short": 2,
    "int": 4,
    "long": 8,
    "bool": 1,
    "uint8_t": 1,
    "uint16_t": 2,
    "uint32_t": 4,
    "uint64_t": 8,
    "u8": 1,
    "u16": 2,
    "u32": 4,
    "u64": 8,
    "s8": 1,
    "s16": 2,
    "s32": 4,
    "s64": 8,
    "__u8": 1,
    "__u16": 2,
    "__u32": 4,
    "__u64": 8,
    "__s8": 1,
    "__s16": 2,
    "__s32": 4,
    "__s64": 8,
}
# where a dynamic array lies is a u32 in the record: length << 16 | offset
STATIC, DATA_LOC, REL_LOC, TO_END = "static", "data_loc", "rel_loc", "to_end"
MAX_RECORD = 1 << 20  # no ring-buffer record is larger than a sub-buffer; offsets beyond it are nonsense


@dataclass(frozen=True)
class Field:
    """One field of an event.

    Parameters
    ----------
    name, type_text : str, as declared
    offset, size : int, bytes within the record
    dtype : of one value; "S" without a size for strings of any length
    place : str, STATIC, or how a dynamic array is found (DATA_LOC, REL_LOC, TO_END)
    """

    name: str
    type_text: str
    offset: int
    size: int
    dtype: np.dtype[Any]
    place: str = STATIC


@dataclass(frozen=True)
class EventFormat:
    """A parsed format file; `common` fields are those every event has."""

    name: str
    system: str
    event_id: int
    common: dict[str, Field]
    fields: dict[str, Field]
    print_fmt: str


@functools.lru_cache(maxsize=4096)
def _parse_declaration(text: str, size: int, signed: bool) -> tuple[str, str, np.dtype[Any], str]:
    """Return (name, type, dtype, place) of a declaration such as `char comm[16]`."""
    place = STATIC
    for word, where in (("__data_loc", DATA_LOC), ("__rel_loc", REL_LOC)):
        if text.startswith(word):
            text, place = text[len(word) :].strip(), where
    type_text, name, count = _split_declaration(text)
    if not name:
        return text, text, _bytes_dtype(size), place
    if place != STATIC:
        return name, type_text, np.dtype("S") if type_text in _CHARS else np.dtype(object), place
    # until 5.x the text of trace_printk and trace_marker was "char buf" and "u32 buf", of no size
    if count is None and size:
        return name, type_text, _scalar_dtype(type_text, size, signed), place
    if size == 0:
        return name, type_text, np.dtype("S") if type_text in _CHARS else np.dtype(object), TO_END
    return name, type_text, _array_dtype(type_text, count or "", size, signed), place


def _split_declaration(text: str) -> tuple[str, str, str | None]:
    """Return (type, name, count of items) of `int x`, `char comm[16]` or `char[16] comm`; name "" where it has none."""
    text, count = text.strip(), None
    if text.endswith("]"):
        text, _, count = text[:-1].rpartition("[")
        text = text.rstrip()
    head = text.rstrip(_WORD)
    name, head = text[len(head) :], head.rstrip()
    if count is None and head.endswith("]"):  # dynamic arrays; old kernels say so of static ones as well
        head, _, count = head[:-1].rpartition("[")
    if name[:1].isdigit():
        name = ""
    return head.strip(), name, count


def _bytes_dtype(size: int) -> np.dtype[Any]:
    return np.dtype((np.uint8, (size,)))


def _scalar_dtype(type_text: str, size: int, signed: bool) -> np.dtype[Any]:
    if size not in (1, 2, 4, 8):
        return _bytes_dtype(size)
    if type_text == "bool" and size == 1:
        return np.dtype(bool)
    return np.dtype(f"<{'i' if signed else 'u'}{size}")


def _array_dtype(type_text: str, count: str, size: int, signed: bool) -> np.dtype[Any]:
    if type_text in _CHARS and type_text != "unsigned char":
        return np.dtype(f"S{size}")
    item = _TYPE_SIZES.get(type_text.rsplit(maxsplit=1)[-1], 0) if type_text else 0
    if count.isdigit() and int(count) and size % int(count) == 0:
        item = size // int(count)
    if item not in (1, 2, 4, 8) or size % item:
        return _bytes_dtype(size)
    return np.dtype((f"<{'i' if signed else 'u'}{item}", (size // item,)))


def parse_event_format(text: str, system: str) -> EventFormat | None:
    """Parse one format file.

    Parameters
    ----------
    text : str, the file's content
    system : str, the tracepoint subsystem it came from

    Returns
    -------
    EventFormat, or None where the text is no event format (then its events stay unknown ones)
    """
    name, event_id = _NAME.search(text), _ID.search(text)
    if name is None or event_id is None:
        return None
    printed = _PRINT.search(text)
    head = text[: printed.start()] if printed else text
    common: dict[str, Field] = {}
    fields: dict[str, Field] = {}
    for declaration, offset, size, signed in _FIELD.findall(head):
        if int(offset) > MAX_RECORD or int(size) > MAX_RECORD:
            continue
        key, type_text, dtype, place = _parse_declaration(declaration.strip(), int(size), signed == "1")
        target = common if key.startswith("common_") else fields
        target[key] = Field(key, type_text, int(offset), int(size), dtype, place)
    fmt = printed[1].strip() if printed else ""
    return EventFormat(name[1], system, int(event_id[1]), common, fields, fmt)


@dataclass(frozen=True)
class PageLayout:
    """Where things lie in a ring-buffer sub-buffer (events/header_page).

    Parameters
    ----------
    commit_size : int, 4 or 8, the kernel's long; the commit word stands at offset 8
    data_offset : int, where records begin
    data_size : int, capacity in bytes
    """

    commit_size: int = 8
    data_offset: int = 16
    data_size: int = 4080

    @property
    def page_size(self) -> int:
        """Bytes of a whole sub-buffer."""
        return self.data_offset + self.data_size


def parse_header_page(text: str) -> PageLayout | None:
    """Parse events/header_page; None where it describes no layout that a kernel ever had."""
    found = {d.split()[-1]: (int(o), int(s)) for d, o, s, _ in _FIELD.findall(text)}
    if found.get("timestamp") != (0, 8) or found.get("commit") not in ((8, 8), (8, 4)) or "data" not in found:
        return None
    offset, size = found["data"]
    commit_size = found["commit"][1]
    if offset != 8 + commit_size or not 0 < size <= MAX_RECORD or size % 4:
        return None
    return PageLayout(commit_size, offset, size)


def validate_header_event(text: str) -> str | None:
    """Return what is unexpected in events/header_event, None if it is the layout we decode."""
    bits = dict(_BITS.findall(text))
    if bits.get("type_len") != "5" or bits.get("time_delta") != "27":
        return f"type_len {bits.get('type_len')} bits, time_delta {bits.get('time_delta')} bits"
    types = dict(_TYPES.findall(text))
    expected = {"padding": "29", "time_extend": "30", "time_stamp": "31"}
    wrong = [f"{k} {v}" for k, v in types.items() if v != expected[k]]
    return ", ".join(wrong) or None
