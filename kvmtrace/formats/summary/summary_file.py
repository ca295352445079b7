"""The file of `kvmtrace record --summary`: one JSON object, "kvmtrace.summary/1".

    {"schema": ..., "meta": {...}, "vcpus": [...]}

`meta` is `kvmtrace.capture/1`. Each row of `vcpus` is a thread that ran a vCPU:

| key | meaning |
|---|---|
| tid, pid, comm | the thread, its process, its name (null if unknown) |
| vcpu_id, isa | null where no VM-exit was seen |
| first_ns, wall_ns | CLOCK_MONOTONIC of its first event, and the time covered from there |
| time_ns | how it was spent: `unknown` (before the first transition), `guest`, `kernel` (in KVM_RUN, not in the guest; guest and kernel together where the KVM traces no VM-entries), `userspace`, `blocked`, `preempted`; sums to wall_ns |
| n_switches | times it left a CPU |
| guest | cell of the stays in guest mode |
| exits | cells with `exit_reason` (the code, without flags): VM-exit to the next VM-entry |
| userspace_exits | cells with `reason` (KVM_EXIT_*), or `error` ("EINTR" "other"): return to the next KVM_RUN |

A cell: `count` (begun), `samples` (ended), `total_ns`, `max_ns`, `buckets` (bucket i counts durations of
2^i to 2^(i+1)-1 ns, the first also 0, the last all above).
"""  # noqa: E501 (a table)

from __future__ import annotations

import json
from typing import Any

from kvmtrace.errors import FormatError, UsageError
from kvmtrace.formats.common.cursor import describe_bytes
from kvmtrace.formats.common.metadata import clean_meta
from kvmtrace.kvm.vm_names import is_meant
from kvmtrace.lazy_dataclass import dataclass

SCHEMA = "kvmtrace.summary/1"
PHASES = ("unknown", "guest", "kernel", "userspace", "blocked", "preempted")
N_BUCKETS = 32
MAX_VCPUS = 1 << 16


@dataclass(frozen=True)
class Cell:
    """Counts, times and a log2 histogram of one thing."""

    count: int
    samples: int
    total_ns: int
    max_ns: int
    buckets: tuple[int, ...]

    @property
    def mean_ns(self) -> float | None:
        """Mean duration, None without samples."""
        return self.total_ns / self.samples if self.samples else None

    def quantile_ns(self, q: float) -> int | None:
        """Return an upper bound of the q-quantile: the end of the bucket it falls in, at most the maximum."""
        wanted, seen = q * sum(self.buckets), 0
        if not self.samples:
            return None
        for i, number in enumerate(self.buckets):
            seen += number
            if number and seen >= wanted:
                return min((2 << i) - 1, self.max_ns)
        return self.max_ns

    def __add__(self, other: Cell) -> Cell:
        return Cell(
            self.count + other.count,
            self.samples + other.samples,
            self.total_ns + other.total_ns,
            max(self.max_ns, other.max_ns),
            tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True)),
        )


@dataclass(frozen=True)
class VcpuSummary:
    """One thread that ran a vCPU; see the module docstring.

    Parameters
    ----------
    exits : exit_reason -> Cell
    userspace_exits : KVM_EXIT_* or "EINTR", "other" -> Cell
    """

    tid: int
    pid: int
    comm: str | None
    vcpu_id: int | None
    isa: str | None
    wall_ns: int
    time_ns: dict[str, int]
    n_switches: int
    guest: Cell | None
    exits: dict[int, Cell]
    userspace_exits: dict[int | str, Cell]


@dataclass(frozen=True)
class Summary:
    """A summary file."""

    path: str
    meta: dict[str, Any]
    vcpus: tuple[VcpuSummary, ...]


def read_summary(data: bytes | memoryview, path: str) -> Summary:
    """Read a summary file.

    Raises
    ------
    FormatError
        It is cut, or not what the schema says.
    """
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise FormatError(path, None, "a whole JSON object", f"{error}"[:80]) from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise FormatError(path, 0, SCHEMA, describe_bytes(bytes(data[:17])))
    return parse_summary(value, path)


def only_vm(data: bytes, path: str, wanted: str) -> bytes:
    """Return a summary file with the vCPU threads of the VMs that `--vm` means alone.

    Raises
    ------
    UsageError
        It names no VM, or none that is meant.
    """
    told = read_summary(data, path).meta.get("vms") or []
    vms = [vm for vm in told if is_meant(wanted, vm["name"], vm["uuid"])]
    if not vms:
        names = ", ".join(vm["name"] for vm in told if vm["name"])
        raise UsageError(f"{path} has no VM {wanted}; it has {names or 'none with a name'}")
    value, pids = json.loads(data), {vm["pid"] for vm in vms}
    value["meta"]["vms"] = vms
    value["vcpus"] = [row for row in value["vcpus"] if row["pid"] in pids]
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def parse_summary(value: dict[str, Any], path: str) -> Summary:
    """Check and type a summary's JSON object."""
    rows, meta = value.get("vcpus"), value.get("meta")
    if not isinstance(rows, list) or not isinstance(meta, dict) or len(rows) > MAX_VCPUS:
        raise FormatError(path, None, "meta and vcpus in the summary", "something else")
    try:
        return Summary(path, clean_meta(meta), tuple(_vcpu(row) for row in rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(path, None, "rows of vcpus as the schema says", f"{type(error).__name__} {error}") from None


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"no count: {value!r}"[:60])
    return value


def _optional(value: Any) -> int | None:
    return None if value is None else _number(value)


def _cell(row: dict[str, Any]) -> Cell:
    buckets = tuple(_number(n) for n in row["buckets"])
    if len(buckets) != N_BUCKETS:
        raise ValueError(f"{len(buckets)} buckets")
    return Cell(
        _number(row["count"]), _number(row["samples"]), _number(row["total_ns"]), _number(row["max_ns"]), buckets
    )


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"no text: {value!r}"[:60])
    return value


def _vcpu(row: dict[str, Any]) -> VcpuSummary:
    guest = row["guest"]
    userspace: dict[int | str, Cell] = {}
    for cell in row["userspace_exits"]:
        key = _text(cell["error"]) if cell["reason"] is None else _number(cell["reason"])
        userspace["other" if key is None else key] = _cell(cell)
    return VcpuSummary(
        tid=_number(row["tid"]),
        pid=_number(row["pid"]),
        comm=_text(row["comm"]),
        vcpu_id=_optional(row["vcpu_id"]),
        isa=_text(row["isa"]),
        wall_ns=_number(row["wall_ns"]),
        time_ns={phase: _number(row["time_ns"][phase]) for phase in PHASES},
        n_switches=_number(row["n_switches"]),
        guest=None if guest is None else _cell(guest),
        exits={_number(cell["exit_reason"]): _cell(cell) for cell in row["exits"]},
        userspace_exits=userspace,
    )
