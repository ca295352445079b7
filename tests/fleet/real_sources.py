"""Sources beside a made fleet, for `fleet summarize`: of faulty KVM builds, damaged, not to be read."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.s3_server import forbid
from kvmtrace.fleet.sources import find_sources

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty"  # builds of linux-source-6.1 with a historic bug put back, see the manifest
MANIFEST = json.loads((FAULTY / "manifest.json").read_text())
BUCKET = "traces"
N_DAMAGED, N_FORBIDDEN, N_VANISHED = 20, 3, 2


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) // 2)]


def _other_head(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(16) + data[16:]


def _zeroed(data: bytes, chance: random.Random) -> bytes:
    n = chance.randrange(64, 1 << 14)
    return bytes(n) + data[n:]


def _scribbled(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(12, 400)
    return data[:at] + chance.randbytes(64) + data[at + 64 :]


def _never_written(data: bytes, chance: random.Random) -> bytes:
    kept = chance.randrange(1 << 9, len(data) // 3)
    return data[:kept] + bytes(len(data) - kept)


def _an_answer(data: bytes, chance: random.Random) -> bytes:
    return b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>"


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut, _other_head, _zeroed, _scribbled, _never_written, _an_answer,
)  # fmt: skip


@dataclass
class RealSources:
    """What lies in the bucket, and what must come of it.

    Parameters
    ----------
    sources : URLs, as they were listed before some vanished
    faulty : (host, rule) that a recording of a faulty KVM must lead to -> its URL
    failures : URL -> kind of error
    """

    sources: list[str] = field(default_factory=list)
    faulty: dict[tuple[str, str], str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def put_sources(files: Any, seed: int) -> RealSources:
    """Fill the bucket; which files are damaged where, and which hosts are faulty, is the seed's."""
    chance, made = random.Random(seed), RealSources()
    healthy = [path for path in sorted((ROOT / "fixtures").glob("*.dat")) if path.stat().st_size < 1 << 16]
    for name, told in MANIFEST.items():
        host = f"faulty-{chance.randrange(10**5):05}-{name[:3]}"  # as long as the lab's own
        data = (FAULTY / name).read_bytes().replace(f"kvmtrace-lab-{name[:3]}".encode(), host.encode())
        files.pipe_file(f"{BUCKET}/{host}.dat", data)
        made.faulty |= {(host, rule): f"s3://{BUCKET}/{host}.dat" for rule in told["violated"]}
    for number in range(N_DAMAGED):
        data = DAMAGES[number % len(DAMAGES)](chance.choice(healthy).read_bytes(), chance)
        files.pipe_file(f"{BUCKET}/damaged-{number}.dat", data)
        made.failures[f"s3://{BUCKET}/damaged-{number}.dat"] = "FormatError"
    for kind, n in (("PermissionError", N_FORBIDDEN), ("FileNotFoundError", N_VANISHED)):
        for number in range(n):
            files.pipe_file(f"{BUCKET}/{kind}-{number}.dat", chance.choice(healthy).read_bytes())
            made.failures[f"s3://{BUCKET}/{kind}-{number}.dat"] = kind
    made.sources = find_sources([f"s3://{BUCKET}/"])
    forbid(files, BUCKET, [f"PermissionError-{number}.dat" for number in range(N_FORBIDDEN)])
    files.rm([f"{BUCKET}/FileNotFoundError-{number}.dat" for number in range(N_VANISHED)])
    return made
