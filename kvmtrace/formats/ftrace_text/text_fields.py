"""The text of events of one kind -> columns.

Every line is read by the fullest pattern that fits it. A field that no line tells does not exist; where some lines tell
it and others do not, a mask says which (`ColumnPayload.told`): what was not printed is never 0.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.formats.ftrace_text.eras import Era, exception_has_error, reread_info2
from kvmtrace.formats.ftrace_text.interrupt_text import COMPOSED
from kvmtrace.formats.ftrace_text.text_patterns import (
    CUT_BY_TRACE_CMD,
    DTYPE_OF_EVENT,
    DTYPES,
    PATTERNS,
    STRINGS,
    WORDS,
    number_reader,
)
from kvmtrace.isa.printed import exit_reason_number
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_PAIR = re.compile(r"(?:^|[ (])([A-Za-z_]\w{0,60})=")
_KEYS_ONLY = re.compile(r"(?:\[FAILED TO PARSE\] )?(?:\([^)]{0,200}\) )?(?=[A-Za-z_]\w{0,60}=)")
# what trace-cmd prints where its plug-in asks for a field that this kernel calls differently
_LEADING = re.compile(r"(?:CAN'T FIND FIELD \"\w{1,40}\"|<CANT FIND FIELD \w{1,40}>)+")
_MASK = (1 << 64) - 1
MAX_KEYS = 64
MAX_FORMS = 64  # sets of keys that the text of one kind of event may have
# events with an exit reason -> the field that has it
_REASONS = {"kvm_exit": "exit_reason", "kvm_nested_vmexit": "exit_reason", "kvm_nested_vmexit_inject": "exit_code"}
_SPECIAL = frozenset(_REASONS) | {"kvm_userspace_exit", "kvm_inj_exception", "kvm_emulate_insn", *COMPOSED}
# bodies that differ in these characters alone are read by one pattern
_VARYING = dict.fromkeys(map(ord, "0123456789abcdefABCDEF"))

Groups = dict[str, "str | None"]


class Pairs:
    """Reads `key=value key=value ...`, values being whatever stands before the next key.

    Parameters
    ----------
    keys : in their order
    alone : bool, text with further keys is of another form
    """

    def __init__(self, keys: Sequence[str], *, alone: bool = False) -> None:
        self.keys = tuple(keys)
        self.alone = alone

    @classmethod
    def of(cls, body: str, *, alone: bool = False) -> Pairs | None:
        """Return a reader for text of this form, None if it is of another."""
        if _KEYS_ONLY.match(body) is None:
            return None
        keys = [m[1] for _, m in zip(range(MAX_KEYS), _PAIR.finditer(body), strict=False)]
        return cls(list(dict.fromkeys(keys)), alone=alone) if keys else None

    def groups(self, body: str) -> Groups | None:
        """Return the values by key, None where the text lacks one."""
        head = _KEYS_ONLY.match(body)
        if head is None:
            return None
        found: Groups = {}
        at, before = head.end(), ""
        for key in self.keys:
            marker = f"{key}=" if not before else f" {key}="
            begin = body.find(marker, at)
            if begin < 0 or (not before and begin != at):
                return None
            if before:
                found[before] = body[at:begin].removesuffix(" ==>").strip()
            at, before = begin + len(marker), key
        found[before] = body[at:].strip()
        if self.alone and any("=" in text and _PAIR.search(text) for text in found.values() if text):
            return None
        return found


Reader = re.Pattern[str] | Pairs


def _groups(reader: Reader, body: str) -> Groups | None:
    if isinstance(reader, Pairs):
        return reader.groups(body)
    match = reader.match(body)
    return match.groupdict() if match is not None else None


def _find(readers: Sequence[Reader], body: str) -> tuple[Reader, Groups] | None:
    """Return the first reader that fits, and what it reads."""
    for reader in readers:
        groups = _groups(reader, body)
        if groups is not None:
            return reader, groups
    return None


def told_by(event: str, body: str) -> tuple[int, int]:
    """Return how many values are read from an event's text, and how much of it that takes; (0, 0) where none is."""
    body = _LEADING.sub("", body)
    for pattern in PATTERNS.get(event, ()):
        match = pattern.match(body)
        if match is not None:
            return sum(text is not None for text in match.groups()), match.end()
    pairs = Pairs.of(body)
    return (0, 0) if pairs is None else (len(pairs.keys), 0)


@dataclass
class TextKind:
    """How the text of one kind of event is read.

    Parameters
    ----------
    name : str
    era : Era, what the whole text tells about the kernel that printed it
    readers : the fullest first
    fields : field name -> dtype; "text" alone where nothing is read from it
    reader_of : shape of a text -> its reader, None where none fits
    printed : exit reasons that no ISA has
    partly : fields that some events do not tell
    sample : the first text that no reader fits; ""
    known : bool, it is an event whose text has patterns here: a line that fits none is not understood
    crowded : bool, it has more forms than are told apart: lines of further ones are not understood
    """

    name: str
    era: Era
    readers: list[Reader] = field(default_factory=list)
    fields: dict[str, np.dtype[Any]] = field(default_factory=dict)
    reader_of: dict[str, Reader | None] = field(default_factory=dict)
    sample: str = ""
    printed: set[str] = field(default_factory=set)
    partly: set[str] = field(default_factory=set)
    crowded: bool = False
    _always: set[str] | None = None

    def __post_init__(self) -> None:
        self.readers += PATTERNS.get(self.name, ())
        self.known = bool(self.readers)

    def see(self, body: str) -> None:
        """Take in what one event tells, if it looks like none before."""
        shape = body.translate(_VARYING)
        body = _LEADING.sub("", body)
        if shape in self.reader_of:
            if self.name == "kvm_exit" and self.era.info2_was_intr_info is None:  # the value itself may tell
                self.era.note(self.name, self.read(body))
            return
        found = _find(self.readers, body)
        self.crowded |= found is None and len(self.readers) >= MAX_FORMS
        if found is None and not self.crowded:
            pairs = Pairs.of(body, alone=self.known)
            if pairs is not None:
                self.readers.append(pairs)
                found = _find([pairs], body)
        self.reader_of[shape] = None if found is None else found[0]
        if found is None:
            self.sample = self.sample or body
        if found is not None:
            self.era.note(self.name, found[1])
            self._note_printed(found[1].get(_REASONS.get(self.name, "")))
        elif not self.known:
            self.fields["text"] = np.dtype("S")
        self._add_fields({} if found is None else found[1])

    def _note_printed(self, reason: str | None) -> None:
        """Remember a reason that no ISA has, for files that are made of this text."""
        if self.name in _REASONS and reason and exit_reason_number(reason, old=self.era.old_names)[0] == 0:
            self.printed.add(reason)

    def _add_fields(self, groups: Groups) -> None:
        told = [name for name, text in groups.items() if text is not None or _zero_if_absent(name)]
        for name in _field_names(self.name, [g for g in told if (self.name, g) not in CUT_BY_TRACE_CMD]):
            self.fields.setdefault(name, _field_dtype(self.name, name))
        names = {name.removesuffix("_hex") for name in told}
        self._always = names if self._always is None else self._always & names

    def finish(self) -> None:
        """Settle what the whole text decides."""
        reason = _REASONS.get(self.name, "")
        if reason in self.fields:
            self.fields.setdefault("isa", _field_dtype(self.name, "isa"))
            self._settle_info2()
        if self.name == "kvm_userspace_exit" and not self.era.tells_errno:
            self.fields.pop("errno", None)
        if self.name == "kvm_page_fault" and self.era.short_error_code:
            self.fields["error_code"] = np.dtype(np.uint32)
        if not self.fields:
            self.fields["text"] = np.dtype("S")
        made = {"text", "immediate_exit"} | ({reason, "isa"} if reason else set())
        self.partly = set(self.fields) - (self._always or set()) - made

    def _settle_info2(self) -> None:
        """Leave out info2, or call it intr_info, where that is so for every line."""
        if "info2" not in self.fields or "intr_info" in self.fields or self.era.info2_was_intr_info is False:
            return
        if self.era.info2_was_intr_info:
            self.fields["intr_info"] = _field_dtype(self.name, "intr_info")
        if self.era.info2_is_always_reread:
            del self.fields["info2"]

    def read(self, body: str) -> Groups:
        """Return the groups of a text, {} where no reader fits."""
        reader = self.reader_of.get(body.translate(_VARYING))
        body = _LEADING.sub("", body)
        groups = None if reader is None else _groups(reader, body)
        if groups is None:  # of equal shape, and yet different: seldom
            found = _find(self.readers, body)
            return {} if found is None else found[1]
        return groups


def _zero_if_absent(group: str) -> bool:
    """Say whether the absence of a word is a 0, as the kernel prints "" for it."""
    return "" in WORDS.get(group, {}) and group != "immediate_exit"


def _field_dtype(event: str, name: str) -> np.dtype[Any]:
    if name in STRINGS:
        return np.dtype("S16")
    if (event, name) == ("kvm_emulate_insn", "insn"):
        return np.dtype((np.uint8, (15,)))
    return DTYPE_OF_EVENT.get((event, name), DTYPES.get(name, np.dtype(np.uint64)))


def _field_names(event: str, groups: Sequence[str]) -> list[str]:
    names = [g.removesuffix("_hex") for g in groups]
    if event in COMPOSED and COMPOSED[event][0] in names:
        return list(COMPOSED[event][1])
    if event == "kvm_userspace_exit" and "outcome" in names:
        return ["reason", "errno"]
    if event == "kvm_inj_exception" and "has_error" not in names:
        names.append("has_error")
    if event == "kvm_emulate_insn" and "len" not in names and "insn" in names:
        names.append("len")
    return names


def _text_of(group: str, text: str | None) -> str | None:
    """Return the text of a group; hexadecimal without 0x, which only its group's name tells, gets one."""
    if text is None:
        return "" if _zero_if_absent(group) else None
    return f"0x{text}" if group.endswith("_hex") and not text.startswith("0x") else text


def _special(kind: TextKind, row: Groups, values: dict[str, int | None]) -> None:
    """Fill the fields that follow from words of the text; None: not told."""
    reason = _REASONS.get(kind.name, "")
    if reason in kind.fields and "isa" not in row:
        isa, values[reason] = exit_reason_number(row.get(reason) or "", old=kind.era.old_names)
        isa = values["isa"] = isa or kind.era.only_isa(values[reason])
        if reason == "exit_reason":
            reread_info2(kind.era, isa, row, values)
    elif kind.name == "kvm_userspace_exit" and "outcome" in row:
        number = int(row["number"] or 0)
        if row["outcome"] in ("restart", "error"):
            values["errno"], values["reason"] = -abs(number), 0
        else:
            values["errno"], values["reason"] = kind.era.errno_of(number), number
    elif kind.name == "kvm_inj_exception" and "has_error" not in row and row:
        values["has_error"] = exception_has_error(kind.era, row)
    elif kind.name == "kvm_emulate_insn" and "len" not in row and row.get("insn") is not None:
        values["len"] = len((row["insn"] or "").split())
    elif kind.name in COMPOSED and COMPOSED[kind.name][0] in row:
        values |= COMPOSED[kind.name][2](row)


def _insn_bytes(text: str | None) -> bytes:
    """Return instruction bytes, 15 of them, of `0f 20 c1` or `ARRAY[0f, 20, c1]`."""
    digits = re.findall(r"\b[0-9a-f]{2}\b", (text or "")[:200])
    return bytes(int(d, 16) for d in digits[:15]).ljust(15, b"\0")


@dataclass(frozen=True)
class Decoded:
    """The fields of n events of one kind.

    Parameters
    ----------
    columns : field name -> values
    told : field name -> bool, shape (n,), which events told it; fields that all told are left out
    unread : positions of events of a known kind whose text fits no pattern
    """

    columns: dict[str, NDArray[Any]]
    told: dict[str, NDArray[np.bool_]]
    unread: list[int]


def decode_bodies(kind: TextKind, bodies: Sequence[str]) -> Decoded:
    """Return the fields of events of one kind.

    Parameters
    ----------
    kind : TextKind
    bodies : the event's own text, per event
    """
    rows = [
        {name.removesuffix("_hex"): _text_of(name, text) for name, text in kind.read(body).items()} for body in bodies
    ]
    unread = [i for i, row in enumerate(rows) if not row] if kind.known else []
    special: list[dict[str, int | None]] = [{} for _ in rows]
    if kind.name in _SPECIAL:
        for row, values in zip(rows, special, strict=True):
            _special(kind, row, values)
    columns, told = {}, {}
    for name in kind.fields:
        if name == "text":
            columns[name] = np.array([b.encode() for b in bodies] or [b""], "S")[: len(bodies)]
            continue
        columns[name], absent = _column(kind, name, rows, special)
        if absent:
            told[name] = np.ones(len(rows), bool)
            told[name][absent] = False
    return Decoded(columns, told, unread)


def _column(
    kind: TextKind, name: str, rows: list[Groups], special: list[dict[str, int | None]]
) -> tuple[NDArray[Any], list[int]]:
    """Return a field's values, and the positions of events that do not tell it."""
    dtype = kind.fields[name]
    absent = [
        i
        for i, (row, values) in enumerate(zip(rows, special, strict=True))
        if (values[name] if name in values else row.get(name)) is None
    ]
    if name == "immediate_exit":  # the kernel prints nothing where it is 0
        absent = []
    if dtype.kind == "S":
        return np.array([(row.get(name) or "").encode()[:16] for row in rows], dtype), absent
    if dtype.shape:
        joined = b"".join(_insn_bytes(row.get(name)) for row in rows)
        return np.frombuffer(joined, np.uint8).reshape(len(rows), 15), absent
    read = number_reader(kind.name, name)
    cache = {text: read(text) & _MASK for text in {row.get(name) or "" for row in rows}}
    values = [
        (values[name] or 0) & _MASK if name in values else cache[row.get(name) or ""]
        for row, values in zip(rows, special, strict=True)
    ]
    return np.array(values, np.uint64).astype(dtype), absent
