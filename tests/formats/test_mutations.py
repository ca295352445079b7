"""Files with changed bytes: read or refused in one line, the same in one piece and in parts, never anything else."""

from __future__ import annotations

import io
import random
import struct
from collections import Counter

import pytest
from writers.in_memory import InMemory
from writers.perf_data import PerfDataWriter, comm, finished_round, lost, sample
from writers.ring_buffer import event, page, record
from writers.trace_dat import TraceDatWriter

from kvmtrace.errors import KvmtraceError
from kvmtrace.formats.arrow import arrow_writing as arrow
from kvmtrace.formats.known_formats import recognise

SMALL = 60  # files of each seed in the suite
NUMBERS = [0, 1, 8, 16, 0x7F, 0xFF, 4096, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63, 2**64 - 1]


def entry(i: int) -> bytes:
    return event(10, struct.pack("<IIQ", 0, 0, i), tid=7)


def trace_dat(version: str, compression: str) -> bytes:
    cpus = [b"".join(page(p * 500 + c, [record(entry(i), 7) for i in range(20)]) for p in range(3)) for c in (0, 1)]
    options = [
        (14, struct.pack("<IIQ", 99, 3, 0)),
        (2, b"CPU: 0\noverrun: 3\n"),
        (12, struct.pack("<QII", 1, 1, 1) + struct.pack("<I6Q", 2, 1, 2, 3, 4, 5, 6)),
    ]
    writer = TraceDatWriter(cpus, options=options, compression=compression, meta={"loss": {"by_cpu": {"0": 1}}})
    return getattr(writer, version)()


def perf_data(*, compressed: bool) -> bytes:
    rounds = [
        r for k in range(3) for r in [*(sample(k * 90 + i, entry(i), cpu=i % 2) for i in range(30)), finished_round()]
    ]
    return PerfDataWriter([comm(1, 2, "x"), *rounds, lost(3, 5, 1)], compressed=compressed).bytes()


def exported(write) -> bytes:
    out = io.BytesIO()
    write(recognise(InMemory(trace_dat("v6", "none"), "seed")), out)
    return out.getvalue()


SEEDS = {
    "v6": lambda: trace_dat("v6", "none"),
    "v7": lambda: trace_dat("v7", "none"),
    "zlib": lambda: trace_dat("v7", "zlib"),
    "zstd": lambda: trace_dat("v7", "zstd"),
    "perf": lambda: perf_data(compressed=False),
    "perf-z": lambda: perf_data(compressed=True),
    "text": lambda: b"".join(b" v-7  [001] d..1.  12.%06d: kvm_entry: vcpu 0, rip 0x1000\n" % i for i in range(40)),
    "parquet": lambda: exported(arrow.write_parquet),
    "arrow": lambda: exported(arrow.write_arrow),
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(max(len(out), 1))
        size = rng.choice([1, 2, 4, 8])
        change = rng.random()
        if change < 0.4:
            out[at : at + 1] = rng.randbytes(1)
        elif change < 0.7:
            out[at : at + size] = (rng.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "little")
        elif change < 0.8:
            del out[at : at + rng.choice([1, 4, 8, 100, 4096])]
        elif change < 0.9:
            out[at:at] = rng.randbytes(size)
        else:
            del out[max(at, 1) :]
    return bytes(out)


def read_or_refused(changed: bytes) -> str:
    """Read a file in one piece and in parts; nothing but one line may come of it else."""
    try:
        recording = recognise(InMemory(changed, "file"))
        events = recording.events()
        for kind in events.kinds:
            for field in kind.fields if events.count(kind.name) else ():
                events.field(kind.name, field)
        loss = recording.loss
        assert sum(map(len, recording.iter_events(50))) == len(events)
        assert recording.loss == loss
    except KvmtraceError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "refused"
    return "read"


def outcomes(seed: str, n: int) -> Counter[str]:
    rng = random.Random(f"{seed}{n if n > SMALL else ''}")
    data = SEEDS[seed]()
    return Counter(read_or_refused(mutate(data, rng)) for _ in range(n))


@pytest.mark.parametrize("seed", SEEDS)
def test_changed_files(seed):
    assert set(outcomes(seed, SMALL)) == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_many_changed_files(seed):
    found = outcomes(seed, 2200)
    print(f"{seed}: {dict(found)}")
    assert set(found) == {"read", "refused"}
