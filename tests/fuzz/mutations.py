"""Ways to damage a file, each drawn from a random.Random so that a case can be repeated."""

from __future__ import annotations

import json
import re
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

HOSTILE = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0xFFF,
    0x1000,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x1_0000,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    0x1_0000_0000,
    0x7FFF_FFFF_FFFF_FFFF,
    0x8000_0000_0000_0000,
    0xFFFF_FFFF_FFFF_FFFF,
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 31,
    1 << 63,
    1 << 64,
    10**400,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "\x1b[31m\0\n",
    "\ud800",
    "-1",
    "9" * 50,
    "²",
    [],
    {},
    [[]],
    {"": None},
    [None] * 3,
    {"0": "x"},
    {"0": -5},
    {"-1": 5},
    {"99999999999999999999": 1 << 70},
    {"1": [1, 2, 3]},
]
META_MAGIC = b"KVMTRACE-META-1\n"
_NUMBER = re.compile(rb"\d+")
_WORD = re.compile(rb"[A-Za-z_]{3,}")


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(1 << rng.randrange(7)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _anywhere(rng: random.Random, size: int, n_bytes: int = 1) -> int:
    """An offset; half of them among the headers, a quarter at a multiple of 4."""
    last = max(size - n_bytes, 0)
    at = rng.randint(0, min(last, 3000) if rng.random() < 0.5 else last)
    return at & ~3 if rng.random() < 0.25 else at


def number(rng: random.Random, data: bytes) -> bytes:
    """Overwrite a little-endian number."""
    size = rng.choice([1, 2, 4, 8])
    value = rng.choice(HOSTILE) if rng.random() < 0.8 else rng.getrandbits(64)
    at = _anywhere(rng, len(data), size)
    out = bytearray(data)
    out[at : at + size] = ((value + rng.choice([0, 0, -1, 1])) & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(out)


def splice(rng: random.Random, data: bytes) -> bytes:
    """Copy, remove or repeat a piece."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 8, 64, 4096, 1 << 20]))
    at = rng.randrange(len(data) + 1)
    return rng.choice(
        [
            data[:a] + data[b:],
            data[:at] + data[a:b] + data[at:],
            data[:at] + data[a:b] + data[at + b - a :],
            data[:b] + data[a:],
        ]
    )


def drop_page(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) // 4096 + 1) * 4096
    gone = data[:at] + data[at + 4096 :]
    return gone if rng.random() < 0.5 else data[:at] + bytes(min(4096, len(data) - at)) + data[at + 4096 :]


def text_number(rng: random.Random, data: bytes) -> bytes:
    """Change a decimal number in a text (format files, ftrace text, JSON)."""
    at = _anywhere(rng, len(data))
    match = _NUMBER.search(data, at, at + 4000)
    if match is None:
        return number(rng, data)
    value = str(rng.choice(HOSTILE)).encode()
    if rng.random() < 0.7:  # sizes in front of the text stay right
        value = value[: len(match[0])].rjust(len(match[0]), b"0")
    return data[: match.start()] + value + data[match.end() :]


def text_word(rng: random.Random, data: bytes) -> bytes:
    """Put one word of a text in another's place."""
    first, second = (_WORD.search(data, at, at + 4000) for at in (_anywhere(rng, len(data)), _anywhere(rng, len(data))))
    if first is None or second is None:
        return flip(rng, data)
    word = second[0] if rng.random() < 0.3 else second[0][: len(first[0])].ljust(len(first[0]), b"_")
    return data[: first.start()] + word + data[first.end() :]


def hostile_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Replace one part of a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: hostile_value(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], hostile_value(rng, value[at], depth + 1), *value[at + 1 :]]
    return rng.choice(VALUES)


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def metadata(rng: random.Random, data: bytes) -> bytes:
    """Change a value in the JSON of a trailer, a bpf capture's head, or a summary; sizes stay right."""
    if data.endswith(META_MAGIC):
        size = int.from_bytes(data[-24:-16], "little")
        parsed = _parse(data[-24 - size : -24])
        if parsed is not None:
            text = _dump(hostile_value(rng, parsed)) if rng.random() < 0.97 else b"[" * 100_000
            return data[: -24 - size] + text + struct.pack("<Q", len(text)) + META_MAGIC
    if data.startswith(b"KVMTRACE-BPF"):
        size = int.from_bytes(data[16:24], "little")
        parsed = _parse(data[24 : 24 + size])
        if parsed is not None:
            text = _dump(hostile_value(rng, parsed))
            text += b" " * (-len(text) % 8)
            return data[:16] + struct.pack("<Q", len(text)) + text + data[24 + size :]
    if data.startswith(b'{"QMP"'):
        answers = data.split(b"\n")
        at = rng.randrange(len(answers))
        answers[at] = _dump(hostile_value(rng, _parse(answers[at]))) if rng.random() < 0.95 else b"[" * 100_000
        return b"\n".join(answers)
    if data.startswith(b'{"'):
        parsed = _parse(data)
        if parsed is not None:
            return _dump(hostile_value(rng, parsed))
    return number(rng, data)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


MUTATIONS = [cut, flip, flip, number, number, number, splice, drop_page, text_number, text_number, text_word, metadata]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Damage `data` in one to four ways."""
    for _ in range(rng.choice([1, 1, 1, 2, 2, 4])):
        if not data:
            break
        data = rng.choice(MUTATIONS)(rng, data)
    return data
