"""The text of events of one kind -> columns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.formats.ftrace_text.text_patterns import (
    CUT_BY_TRACE_CMD,
    DTYPE_OF_EVENT,
    DTYPES,
    PATTERNS,
    STRINGS,
    WORDS,
    number_reader,
)
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX, SVM_EXIT_REASONS, VMX_EXIT_REASONS, VMX_FAILED_VMENTRY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_PAIR = re.compile(r"(?:^|[ (])([A-Za-z_]\w*)=")
_KEYS_ONLY = re.compile(r"(?:\[FAILED TO PARSE\] )?(?:\([^)]*\) )?(?=[A-Za-z_]\w*=)")
_MASK = (1 << 64) - 1

_VMX_NAMES = {name: number for number, name in VMX_EXIT_REASONS.items()}
_SVM_NAMES = {name: number for number, name in SVM_EXIT_REASONS.items()}
# trace-cmd's plug-in names SVM's as the header does, and one of VMX as older kernels did
_SVM_ALIASES = {"INTR": "interrupt", "IOIO": "io"}
_VMX_NAMES["PENDING_INTERRUPT"] = 7
_UNKNOWN_REASON = re.compile(r"(?:UNKNOWN )?\(?(0x[0-9a-f]+|\d+)\)?$")


def exit_reason_number(text: str) -> tuple[int, int]:
    """Return (isa, exit_reason) of a reason as printed; isa 0 and reason 2**32 - 1 where it says nothing.

    VMX reasons are upper case, SVM's lower case, or led by EXIT_ in trace-cmd's plug-in.
    """
    name, _, flags = text.partition(" FAILED_VMENTRY")
    if name in _VMX_NAMES:
        failed = VMX_FAILED_VMENTRY if flags or text.endswith("FAILED_VMENTRY") else 0
        return ISA_VMX, _VMX_NAMES[name] | failed
    if name in _SVM_NAMES:
        return ISA_SVM, _SVM_NAMES[name]
    if name.startswith("EXIT_"):
        short = name[5:]
        own = f"{short[5:]} excp" if short.startswith("EXCP_") else _SVM_ALIASES.get(short, short.lower())
        return ISA_SVM, _SVM_NAMES.get(own, 0xFFFFFFFF)
    number = _UNKNOWN_REASON.match(name)
    return (0, int(number[1], 0) & 0xFFFFFFFF) if number else (0, 0xFFFFFFFF)


@dataclass(frozen=True)
class TextKind:
    """How the text of one kind of event is read.

    Parameters
    ----------
    name : str
    patterns : the one that fits its first event first, the others behind; () for text that is kept as it is
    fields : field name -> dtype
    """

    name: str
    patterns: tuple[re.Pattern[str], ...]
    fields: dict[str, np.dtype[Any]]


def _pairs_pattern(body: str) -> re.Pattern[str] | None:
    """Return a pattern for `key=value key=value ...` as in this text, None if it is not of that form."""
    if _KEYS_ONLY.match(body) is None:
        return None
    keys = list(dict.fromkeys(_PAIR.findall(body)))
    parts = [rf"{key}=(?P<{key}>{'.*?' if i < len(keys) - 1 else '.*'})" for i, key in enumerate(keys)]
    return re.compile(r"(?:\[FAILED TO PARSE\] )?(?:\([^)]*\) )?" + " (?:==> )?".join(parts) + r"\s*$")


def _field_dtype(event: str, field: str) -> np.dtype[Any]:
    if field in STRINGS:
        return np.dtype("S16")
    if (event, field) == ("kvm_emulate_insn", "insn"):
        return np.dtype((np.uint8, (15,)))
    return DTYPE_OF_EVENT.get((event, field), DTYPES.get(field, np.dtype(np.uint64)))


def _field_names(event: str, groups: Sequence[str], *, of_trace_cmd: bool) -> list[str]:
    names = [g.removesuffix("_hex") for g in groups]
    if event == "kvm_exit" and "isa" not in names:
        names.append("isa")
    if event == "kvm_userspace_exit" and "outcome" in names:
        # trace-cmd prints the reason where the kernel prints the errno
        return ["reason"] if of_trace_cmd else ["reason", "errno"]
    if event == "kvm_inj_exception" and "has_error" not in names:
        names.append("has_error")
    if event == "kvm_emulate_insn" and "len" not in names:
        names.append("len")
    return names


def _told_groups(event: str, pattern: re.Pattern[str], body: str) -> list[str]:
    """Return the groups that this text tells: those that took part, and marks whose absence means 0."""
    match = pattern.match(body)
    assert match is not None
    return [
        g
        for g, text in match.groupdict().items()
        if (text is not None or ("" in WORDS.get(g, {}) and g != "immediate_exit"))
        and (event, g) not in CUT_BY_TRACE_CMD
    ]


def choose_text_kind(event: str, body: str, *, of_trace_cmd: bool) -> TextKind:
    """Return how events like this one are read.

    Parameters
    ----------
    event : str, name
    body : str, the text of its first event
    of_trace_cmd : bool, the text is trace-cmd's, not the kernel's
    """
    listed = PATTERNS.get(event, ())
    pairs = _pairs_pattern(body)
    candidates = [p for p in (*listed, *([pairs] if pairs else [])) if p.match(body)]
    if not candidates:
        return TextKind(event, (), {"text": np.dtype("S")})
    chosen = candidates[0]
    groups = _told_groups(event, chosen, body)
    names = _field_names(event, groups, of_trace_cmd=of_trace_cmd)
    return TextKind(
        event, (chosen, *(p for p in listed if p is not chosen)), {name: _field_dtype(event, name) for name in names}
    )


def _with_prefix(group: str, text: str | None) -> str:
    """Return the text of a group; hexadecimal without 0x, which only its group's name tells, gets one."""
    if not text or not group.endswith("_hex"):
        return text or ""
    return text if text.startswith("0x") else f"0x{text}"


def _match_all(kind: TextKind, bodies: Sequence[str]) -> list[dict[str, str]]:
    """Return the groups of each text, {} where no pattern fits."""
    out = []
    for body in bodies:
        for pattern in kind.patterns:
            match = pattern.match(body)
            if match:
                out.append({k.removesuffix("_hex"): _with_prefix(k, v) for k, v in match.groupdict().items()})
                break
        else:
            out.append({})
    return out


def _special(event: str, row: dict[str, str], values: dict[str, int]) -> None:
    """Fill the fields that follow from words of the text."""
    if event == "kvm_exit" and row.get("exit_reason", "") and not row["exit_reason"].isdigit():
        isa, values["exit_reason"] = exit_reason_number(row["exit_reason"])
        values.setdefault("isa", isa)
    elif event == "kvm_userspace_exit" and "outcome" in row:
        number = int(row["number"])
        if row["outcome"] in ("restart", "error"):
            values["errno"], values["reason"] = -abs(number), 0
        else:
            values["errno"], values["reason"] = 0, number
    elif event == "kvm_inj_exception" and "has_error" not in row:
        values["has_error"] = int(bool(row.get("error_code")))
    elif event == "kvm_emulate_insn" and "len" not in row and "insn" in row:
        values["len"] = len(row["insn"].split())


def _insn_bytes(text: str) -> bytes:
    """Return instruction bytes, 15 of them, of `0f 20 c1` or `ARRAY[0f, 20, c1]`."""
    digits = re.findall(r"\b[0-9a-f]{2}\b", text)
    return bytes(int(d, 16) for d in digits[:15]).ljust(15, b"\0")


def decode_bodies(kind: TextKind, bodies: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return the fields of events of one kind.

    Parameters
    ----------
    kind : TextKind
    bodies : the event's own text, per event
    """
    if not kind.patterns:
        return {"text": np.array([b.encode() for b in bodies] or [b""], "S")[: len(bodies)]}
    rows = _match_all(kind, bodies)
    special: list[dict[str, int]] = [{} for _ in rows]
    if kind.name in ("kvm_exit", "kvm_userspace_exit", "kvm_inj_exception", "kvm_emulate_insn"):
        for row, values in zip(rows, special, strict=True):
            _special(kind.name, row, values)
    return {name: _column(kind, name, rows, special) for name in kind.fields}


def _column(kind: TextKind, name: str, rows: list[dict[str, str]], special: list[dict[str, int]]) -> NDArray[Any]:
    dtype = kind.fields[name]
    if dtype.kind == "S":
        return np.array([row.get(name, "").encode()[:16] for row in rows], dtype)
    if dtype.shape:
        joined = b"".join(_insn_bytes(row.get(name, "")) for row in rows)
        return np.frombuffer(joined, np.uint8).reshape(len(rows), 15)
    read = number_reader(kind.name, name)
    cache = {text: read(text) & _MASK for text in {row.get(name, "") for row in rows}}
    values = [s[name] & _MASK if name in s else cache[row.get(name, "")] for row, s in zip(rows, special, strict=True)]
    return np.array(values, np.uint64).astype(dtype)
