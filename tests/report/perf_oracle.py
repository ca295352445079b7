"""perf kvm stat's state machine in plain Python, one event at a time, as the oracle of the columnar tables.

Source: tools/perf/builtin-kvm.c, tools/perf/arch/x86/util/kvm-stat.c
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

MMIO_READ, MMIO_WRITE = 1, 2


def begin_key(event: str, kind: str, fields: dict[str, Any]) -> tuple[bool, Any]:
    """Say whether an event begins a sample, and its key (None: not known yet)."""
    if event == "mmio":
        if kind == "kvm_exit":
            return True, None
        if kind == "kvm_mmio" and fields.get("type") == MMIO_WRITE:
            return True, (fields["gpa"], MMIO_WRITE)
        return False, None
    wanted, key = {
        "vmexit": ("kvm_exit", ("exit_reason",)),
        "ioport": ("kvm_pio", ("port", "rw")),
        "msr": ("kvm_msr", ("ecx", "write")),
    }[event]
    return (True, tuple(fields.get(name, 0) for name in key)) if kind == wanted else (False, None)


def end_key(event: str, kind: str, fields: dict[str, Any]) -> tuple[bool, Any]:
    """Say whether an event ends a sample, and the key that it brings."""
    if event == "mmio" and kind == "kvm_mmio" and fields.get("type") == MMIO_READ:
        return True, (fields["gpa"], MMIO_READ)
    return kind == "kvm_entry", None


def perf_samples(event: str, rows: Iterable[tuple[Any, ...]]) -> dict[Any, list[int]]:
    """Return key -> durations, ns, as perf collects them."""
    samples: dict[Any, list[int]] = {}
    state: dict[int, list[Any]] = {}  # tid -> [start, key]
    for ts_ns, _, tid, kind, *rest in rows:
        fields = rest[0] if rest else {}
        if tid not in state:
            if kind != "kvm_entry":
                continue
            state[tid] = [0, None]
        vcpu = state[tid]
        begins, key = begin_key(event, kind, fields)
        if begins:
            vcpu[:] = [ts_ns, key]
            continue
        ends, key = end_key(event, kind, fields)
        if not ends or vcpu[0] == 0 or (vcpu[1] is None and key is None):
            continue
        charged = vcpu[1] if vcpu[1] is not None else key
        start, vcpu[:] = vcpu[0], [0, None]
        if ts_ns >= start:
            samples.setdefault(charged, []).append(ts_ns - start)
    return samples


def rel_stderr(values: list[int]) -> float:
    """Return perf's +- percentage, by its running update."""
    mean = m2 = 0.0
    for n, value in enumerate(values, 1):
        delta = value - mean
        mean += delta / n
        m2 += delta * (value - mean)
    if len(values) < 2 or mean == 0:
        return 0.0
    return 100 * math.sqrt(m2 / (len(values) - 1) / len(values)) / mean
