"""A recording that can be shared: no host, file and thread names, no guest addresses, consistently throughout.

Durations, counts, reasons, ports, MSRs, thread numbers and instruction bytes are kept: they are what a recording is
for. Of an unknown event, texts are left out, and numbers that are as large as addresses are taken for some.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.registry import ISAS
from kvmtrace.kvm.apic import APIC_DEFAULT_BASE, N_X2APIC_MSRS, X2APIC_MSR_BASE
from kvmtrace.report.anonymize import (
    ADDRESS_FIELDS,
    COMM_FIELDS,
    FIRST_HIDDEN,
    HEXDUMP,
    PAGE_MASK,
    StandIns,
    anonymized_meta,
)
from kvmtrace.table.event_table import COMMON_DTYPES, EventTable
from kvmtrace.table.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from kvmtrace.table.payload import Payload
    from kvmtrace.table.recording import Loss

_ALWAYS_LARGE = 1 << 32  # what a number that is no address hardly reaches
# what is as large without being an address: our own and the tracer's numbers, qualifications, error codes, times
_NUMBERS = frozenset({"count", "ns", "info1", "error_code", "tsc_offset", "previous_tsc_offset", "next_tsc_offset"})
_APIC_VALUES = frozenset({"data", "val"})
_MAX_ERRNO = 4095  # include/linux/err.h
_PAGES = frozenset({"gfn"})  # numbers of pages, not addresses
_REGION_BITS = 21  # what lies together stays together: an instruction may end on the page behind
_REGION_MASK = (1 << _REGION_BITS) - 1
_FIRST_REGION = 1 << 12  # of the stand-ins: from 8 GiB on


class RegionStandIns(StandIns):
    """Stand-ins of addresses by regions of 2 MiB, neighbours staying neighbours, so that the model still applies."""

    def __init__(self) -> None:
        super().__init__()
        self._regions: dict[int, int] = {}
        self._used: set[int] = set()

    def address(self, value: int) -> int:
        """Return an address in a stand-in region; the offset within it is kept, and so is the first 64 KiB."""
        if value < FIRST_HIDDEN:
            return value
        return self._region(value >> _REGION_BITS) << _REGION_BITS | value & _REGION_MASK

    def _region(self, region: int) -> int:
        if region not in self._regions:
            beside = [self._regions.get(region - step, -1) + step for step in (1, -1) if region - step in self._regions]
            free = [number for number in beside if number not in self._used]
            number = free[0] if free else max(self._used, default=_FIRST_REGION) + 16
            self._regions[region] = number
            self._used.add(number)
        return self._regions[region]


class AnonymizedRecording(Recording):
    """The same recording under stand-ins.

    Parameters
    ----------
    recording : Recording
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._names = RegionStandIns()
        capture = recording.capture
        meta = anonymized_meta(capture.meta, self._names)
        self.capture = replace(capture, path="recording", host=None, cpu_model=None, meta=meta)
        self.kinds = recording.kinds
        self.comms = {tid: self._names.name(comm) for tid, comm in recording.comms.items()}
        self.processes = recording.processes
        self.partly_told = recording.partly_told
        self.vm = None if recording.vm is None else ", ".join(map(self._names.vm, recording.vm.split(", ")))

    @property
    def read_share(self) -> float | None:  # type: ignore[override]
        """How much of the recording is read."""
        return self._recording.read_share

    @property
    def loss(self) -> Loss:  # type: ignore[override]
        """What is missing; bytes that were found instead are left out."""
        loss = self._recording.loss
        damage = tuple(replace(one, found=HEXDUMP.sub("(left out)", one.found)) for one in loss.damage)
        return replace(loss, damage=damage)

    def events(self) -> EventTable:
        """Return all events."""
        return self._of(self._recording.events())

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield consecutive tables."""
        return map(self._of, self._recording.iter_events(max_events))

    def _of(self, table: EventTable) -> EventTable:
        columns = {name: getattr(table, name) for name in COMMON_DTYPES}
        payloads: dict[int, Payload] = {
            index: _HiddenPayload(payload, self._names) for index, payload in table.payloads.items()
        }
        return EventTable(columns, table.kinds, payloads)


class _HiddenPayload:
    """Fields with their names and addresses replaced."""

    def __init__(self, payload: Payload, names: StandIns) -> None:
        self._payload = payload
        self._names = names

    @property
    def fields(self) -> Mapping[str, np.dtype[Any]]:
        """See Payload."""
        return self._payload.fields

    def told(self, name: str) -> NDArray[np.bool_] | None:
        """See Payload."""
        return self._payload.told(name)

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        values = self._payload.column(name, rows)
        if values.dtype.kind == "S":
            return _renamed(values, self._names) if name in COMM_FIELDS else np.zeros_like(values)
        if values.dtype.kind == "O":
            return np.full(len(values), b"", object)
        if values.dtype.kind not in "iu" or values.ndim > 1 or values.dtype.itemsize < 4:
            return values
        hidden = _addresses(name, values, self._names)
        if name == "info2" and "isa" in self.fields:
            hidden = np.where(np.isin(self._payload.column("isa", rows), _info2_is_address()), hidden, values)
        if name in _APIC_VALUES:
            hidden = np.where(self._of_the_apic(rows, len(values)), values, hidden)
        return hidden

    def _of_the_apic(self, rows: NDArray[np.intp] | None, n_rows: int) -> NDArray[np.bool_]:
        """Say which values are those of LAPIC registers: no addresses, and their bits are judged."""
        if {"reg", "rw"} <= self.fields.keys():  # kvm_apic
            return np.ones(n_rows, bool)
        if "ecx" in self.fields:  # kvm_msr
            register = self._payload.column("ecx", rows).astype(np.int64) - X2APIC_MSR_BASE
            return np.asarray((register >= 0) & (register < N_X2APIC_MSRS))
        if "gpa" in self.fields:  # kvm_mmio
            page = self._payload.column("gpa", rows).astype(np.uint64) >> np.uint64(12)
            return np.asarray(page == APIC_DEFAULT_BASE >> 12)
        return np.zeros(n_rows, bool)


def _info2_is_address() -> list[int]:
    """Return the ISAs whose VM-exits have a guest-physical address in info2; others say there what was interrupted."""
    return [isa.number for isa in ISAS if isa.fault_address_field == "info2"]


def _renamed(values: NDArray[Any], names: StandIns) -> NDArray[Any]:
    """Return names of threads as stand-ins, as long as the field is."""
    distinct, inverse = np.unique(values, return_inverse=True)
    hidden = [names.name(one.decode("utf-8", "replace")).encode() if one else b"" for one in distinct.tolist()]
    return np.array(hidden or [b""]).astype(values.dtype)[inverse.reshape(-1)]


def _addresses(name: str, values: NDArray[Any], names: StandIns) -> NDArray[Any]:
    """Return numbers with addresses on stand-in pages; each page is looked up once."""
    if name in _PAGES:
        return _addresses("address", values.astype(np.uint64) << np.uint64(12), names).astype(values.dtype) >> 12
    numbers = values.astype(np.uint64)
    is_address = numbers >= (FIRST_HIDDEN if name in ADDRESS_FIELDS else _ALWAYS_LARGE)
    if values.dtype.kind == "i":
        is_address &= (values >= 0) | (values < -_MAX_ERRNO)
    if name in _NUMBERS or name.endswith("_ns") or not is_address.any() or values.dtype.itemsize < 8:
        return values
    pages, inverse = np.unique(numbers[is_address] >> np.uint64(12), return_inverse=True)
    # the offset within the page stands in for one above the first pages, which are not hidden
    hidden = np.array([names.address(page << 12 | PAGE_MASK) & ~PAGE_MASK for page in pages.tolist()], np.uint64)
    found = numbers.copy()
    found[is_address] = hidden[inverse.reshape(-1)] | numbers[is_address] & np.uint64(PAGE_MASK)
    return found.view(values.dtype) if values.dtype.itemsize == 8 else found.astype(values.dtype)
