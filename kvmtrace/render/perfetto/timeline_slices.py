"""Slices of what each vCPU did: its parts of time, and the decoded VM-exit where one begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.render.perfetto.trace_content import HEX, NUMBER, TEXT, Argument, Slices
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.slices import PART_NAMES, joined_slices
from kvmtrace.spans.time_parts import Part
from kvmtrace.spans.vm_exits import VmExitRows, told_fields

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.render.perfetto.trace_content import Names
    from kvmtrace.spans.span_builder import Spans

# argument -> (column of EXIT_DTYPE, kind, what says that it is there: a column of bools, or a value that means none;
# None: it always is)
_ARGUMENTS: dict[str, tuple[str, str, str | int | None]] = {
    "guest_rip": ("guest_rip", HEX, None),
    "cpu": ("cpu", NUMBER, -1),
    "vm_exit": ("number", NUMBER, -1),
    "to_entry_ns": ("dur_ns", NUMBER, -1),
    "entry_rip": ("entry_rip", HEX, "has_entry_rip"),
    "info1": ("info1", HEX, 0),
    "info2": ("info2", HEX, 0),
    "intr_info": ("intr_info", HEX, 0),
    "error_code": ("error_code", HEX, 0),
    "port": ("port", HEX, -1),
    "gpa": ("gpa", HEX, "has_gpa"),
    "msr": ("msr", HEX, -1),
    "cr": ("cr", NUMBER, -1),
    "syndrome": ("syndrome", HEX, "has_syndrome"),
    "register": ("register", HEX, -1),
    "hypercall": ("hypercall", HEX, -1),
    "size": ("size", NUMBER, -1),
    "data": ("data", HEX, "has_data"),
    "vector": ("vector", HEX, -1),
    "lost": ("lost", NUMBER, 0),
}


class VcpuSlices:
    """Makes the slices of consecutive pieces of spans, which must know their rows."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._exits = VmExitRows()
        self._access = np.array([0, names.number("read"), names.number("write")])

    def feed(self, spans: Spans) -> Slices:
        """Return the slices of a piece; the track of a thread is its number plus 1."""
        lanes = spans.lanes
        exits = self._exits.feed(spans)
        found = joined_slices(lanes, spans.swept.dur_ns, spans.swept.part)
        assert lanes.row is not None
        rows = np.where(lanes.step[found.first] == Step.EXIT, lanes.row[found.first], -1)
        at = np.minimum(np.searchsorted(exits["row"], rows), max(len(exits) - 1, 0))
        known = (exits["row"][at] == rows) if len(exits) else np.zeros(len(rows), bool)
        return Slices(
            track=lanes.thread[found.first].astype(np.int64) + 1,
            name=self._slice_names(spans, found.part, found.reason),
            ts_ns=lanes.ts_ns[found.first],
            dur_ns=found.dur_ns,
            arguments=self._arguments(exits, at, known),
        )

    def _slice_names(self, spans: Spans, part: NDArray[np.uint8], reason: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the name of each slice: "kernel: CPUID"."""
        reasons = spans.keys.reasons.keys()
        code = part.astype(np.int64) << 32 | (reason.astype(np.int64) + 1)
        values, inverse = np.unique(code, return_inverse=True)
        numbers = []
        for value in values.tolist():
            word, number = PART_NAMES[Part(value >> 32)], (value & 0xFFFFFFFF) - 1
            name = word if number < 0 else f"{word}: {describe_exit_reason(*split_pair(reasons[number]))}"
            numbers.append(self._names.number(name))
        found: NDArray[np.int64] = np.array(numbers, np.int64)[inverse.reshape(-1)]
        return found

    def _arguments(self, exits: NDArray[Any], at: NDArray[np.intp], known: NDArray[np.bool_]) -> dict[str, Argument]:
        """Return the arguments of slices that begin with the VM-exit `at`, where `known`."""
        if not len(exits):
            return {}
        own = exits[at]
        arguments = {}
        for name, (column, kind, told) in _ARGUMENTS.items():
            present = known & told_fields(own, column)
            if told is not None:
                present = present & (own[told] if isinstance(told, str) else own[column].astype(np.int64) != told)
            if present.any():
                arguments[name] = Argument(kind, own[column].astype(np.int64).view(np.uint64), present)
        directed = known & (own["write"] >= 0)
        if directed.any():
            arguments["access"] = Argument(TEXT, self._access[own["write"] + 1].astype(np.uint64), directed)
        left = known & own["to_userspace"]
        if left.any():
            arguments["userspace_exit"] = Argument(TEXT, self._userspace_names(own), left)
        return arguments

    def _userspace_names(self, exits: NDArray[Any]) -> NDArray[np.uint64]:
        code = exits["userspace_reason"] << 32 | (exits["errno"] & 0xFFFFFFFF)
        values, inverse = np.unique(code, return_inverse=True)
        numbers = [
            self._names.number(describe_userspace_exit(value >> 32, (value & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)))
            for value in values.tolist()
        ]
        found: NDArray[np.uint64] = np.array(numbers, np.uint64)[inverse.reshape(-1)]
        return found
