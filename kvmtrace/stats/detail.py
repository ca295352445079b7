"""What the exits were about: ports, addresses, MSRs, control registers, hypercalls, guest instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvmtrace.isa.registry import describe_exit_reason, describe_register, isa_name
from kvmtrace.kvm.hypercalls import describe_hypercall
from kvmtrace.kvm.msrs import describe_msr
from kvmtrace.kvm.ports import describe_port
from kvmtrace.kvm.psci import describe_psci
from kvmtrace.spans.keys import Counter, KeyIndex
from kvmtrace.spans.lane_keys import NOT_TOLD, PAGE_SHIFT, LaneKeys, split_pair, u64
from kvmtrace.spans.lanes import REASON_BITS, REASON_MASK, Step
from kvmtrace.stats.injections import InjectionAccumulator, InstructionAccumulator
from kvmtrace.stats.rows import CpuRow, CrRow, Detail, GpaRow, HypercallRow, LeftOut, MsrRow, PortRow, RipRow, SysregRow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.pairs import Pairs
    from kvmtrace.table.event_table import EventTable

Row = TypeVar("Row", PortRow, GpaRow, MsrRow, CrRow, SysregRow, HypercallRow, RipRow)

# family -> the steps that belong to it
FAMILIES: dict[str, tuple[Step, ...]] = {
    "ports": (Step.PIO,),
    "mmio": (Step.MMIO_READ, Step.MMIO_WRITE),
    "msrs": (Step.MSR,),
    "crs": (Step.CR,),
    "hypercalls": (Step.HYPERCALL,),
    "registers": (Step.REGISTER,),
    "calls": (Step.CALL,),
    "pages": (Step.PAGE_FAULT,),
}


class _Family:
    """Counts and times of one kind of access."""

    def __init__(self) -> None:
        self.count = Counter()
        self.total_ns = Counter()
        self.timed = Counter()  # accesses whose VM-exit's time is known

    def feed(self, lanes: Lanes, rows: NDArray[np.intp], owner: NDArray[np.int32], dur_ns: NDArray[np.int64]) -> None:
        """Count the accesses at `rows`; a VM-exit's time goes to its first access.

        Parameters
        ----------
        owner : (len(rows),) lane row of the VM-exit that each access belongs to, -1 if none is known
        dur_ns : (n,) time of the VM-exit at each lane row
        """
        self.count.add(lanes.arg[rows])
        first = owner >= 0
        first[1:] &= owner[1:] != owner[:-1]
        self.total_ns.add(lanes.arg[rows[first]], dur_ns[owner[first]])
        self.timed.add(lanes.arg[rows[owner >= 0]])

    def total(self, number: int) -> int | None:
        """Return the time of a key's VM-exits, None if not known of any."""
        return self.total_ns[number] if self.timed[number] else None


def _faults_on_memory(lanes: Lanes, pairs: Pairs) -> NDArray[np.intp]:
    """Return the lane rows of kvm_guest_fault whose VM-exit was no MMIO, which is told by its own event."""
    is_mmio = np.zeros(len(lanes) + 1, bool)  # of a VM-exit at a lane row; the last: owner -1
    access = np.flatnonzero((lanes.step == Step.MMIO_READ) | (lanes.step == Step.MMIO_WRITE))
    is_mmio[pairs.owner[access]] = True
    is_mmio[-1] = False
    faults = np.flatnonzero(lanes.step == Step.GUEST_FAULT)
    return faults[~is_mmio[pairs.owner[faults]]]


class DetailAccumulator:
    """Collects attributions over consecutive pieces of lanes and tables."""

    def __init__(self) -> None:
        self._families = {name: _Family() for name in FAMILIES}
        self._sites = KeyIndex()  # RIP's number << REASON_BITS | reason's number
        self._site_count = Counter()
        self._site_ns = Counter()
        self._cpus = Counter()
        self._msr_faults = Counter()
        self._other_hypercalls = {"hyper-v": (KeyIndex(), Counter()), "xen": (KeyIndex(), Counter())}
        self._fast_mmio = (KeyIndex(), Counter())
        self._injections = InjectionAccumulator()
        self._instructions = InstructionAccumulator()

    def feed(self, lanes: Lanes, pairs: Pairs, *, owned: bool = False) -> None:
        """Take in the next piece of lanes; `owned`: only accesses that belong to one of the pairs' VM-exits."""
        edges = pairs.edges
        exits = edges[pairs.is_exit]
        self._cpus.add(lanes.cpu[exits] + 1)
        sites = self._sites.encode(lanes.arg[exits])
        self._site_count.add(sites)
        is_handled = np.zeros(len(edges), bool)
        is_handled[:-1] = pairs.handling & pairs.sound
        handled, handled_ns = edges[is_handled], pairs.dur_ns[is_handled[:-1]]
        self._site_ns.add(sites[is_handled[pairs.is_exit]], handled_ns)
        present = np.bincount(lanes.step, minlength=len(Step)) > 0
        if not any(present[step] for steps in FAMILIES.values() for step in steps) and not present[Step.GUEST_FAULT]:
            return
        dur_ns = np.full(len(lanes), -1, np.int64)
        dur_ns[handled] = handled_ns
        for name, steps in FAMILIES.items():
            if any(present[step] for step in steps):
                rows = np.flatnonzero((lanes.step >= steps[0]) & (lanes.step <= steps[-1]))
                self._feed_family(name, rows, lanes, pairs, dur_ns, owned=owned)
        if present[Step.GUEST_FAULT]:
            self._feed_family("pages", _faults_on_memory(lanes, pairs), lanes, pairs, dur_ns, owned=owned)

    def _feed_family(
        self,
        name: str,
        rows: NDArray[np.intp],
        lanes: Lanes,
        pairs: Pairs,
        dur_ns: NDArray[np.int64],
        *,
        owned: bool,
    ) -> None:
        if owned:
            rows = rows[pairs.owner[rows] >= 0]
        edge = pairs.owner[rows]
        owner = np.where((edge >= 0) & (dur_ns[edge] >= 0), edge, np.int32(-1))
        self._families[name].feed(lanes, rows, owner, dur_ns)

    def feed_table(self, table: EventTable, keys: LaneKeys) -> None:
        """Take in what needs no lanes."""
        self._injections.feed(table)
        self._instructions.feed(table)
        if table.count("kvm_msr") and table.has("kvm_msr", "exception"):
            faulted = table.field("kvm_msr", "exception") != 0
            if faulted.any():
                pairs = u64(table, "kvm_msr", "write") << np.uint64(32) | u64(table, "kvm_msr", "ecx")
                self._msr_faults.add(keys.msrs.encode(pairs[faulted]))
        for interface, event, name in (("hyper-v", "kvm_hv_hypercall", "code"), ("xen", "kvm_xen_hypercall", "nr")):
            if table.count(event):
                index, counter = self._other_hypercalls[interface]
                counter.add(index.encode(u64(table, event, name)))
        if table.count("kvm_fast_mmio"):
            index, counter = self._fast_mmio
            counter.add(index.encode(u64(table, "kvm_fast_mmio", "gpa")))

    def finish(self, keys: LaneKeys, symbol: Callable[[int], str | None], limit: int) -> Detail:
        """Return the rows.

        Parameters
        ----------
        limit : rows of a list; what lies behind is told in one
        symbol : guest address -> its symbol, None if there is none
        """
        lists = {
            "ports": self._rows("ports", keys.ports, _port_row),
            "gpas": self._gpa_rows(keys),
            "msrs": self._rows("msrs", keys.msrs, self._msr_row),
            "crs": self._rows("crs", keys.crs, _cr_row),
            "sysregs": self._rows("registers", keys.registers, _register_row),
            "hypercalls": self._hypercall_rows(keys),
            "interrupts": self._injections.rows(),
            "emulated": self._instructions.rows(),
        }
        cut = {name: rows[:limit] for name, rows in lists.items()}
        left_out = {name: _rest(rows[limit:]) for name, rows in lists.items() if len(rows) > limit}
        cut["rips"], rest = self._rip_rows(keys, symbol, limit)
        left_out |= {"rips": rest} if rest.rows else {}
        cpus = [CpuRow(cpu - 1, int(n)) for cpu, n in enumerate(self._cpus.values) if n and cpu]
        distinct = {name: len(rows) for name, rows in lists.items()} | {"rips": len(self._sites)}
        return Detail(**cut, cpus=tuple(cpus), distinct=distinct, left_out=left_out)  # type: ignore[arg-type]

    def _rows(self, family: str, index: KeyIndex, row: Callable[[int, int, int, int | None], Row]) -> tuple[Row, ...]:
        counts = self._families[family]
        found = [row(n, key, counts.count[n], counts.total(n)) for n, key in enumerate(index.keys()) if counts.count[n]]
        return _sorted(found)

    def _gpa_rows(self, keys: LaneKeys) -> tuple[GpaRow, ...]:
        index, counter = self._fast_mmio
        fast = [GpaRow(gpa, "fast mmio", counter[n], None) for n, gpa in enumerate(index.keys())]
        mmio = self._rows("mmio", keys.mmio, _mmio_row)
        return _sorted([*mmio, *fast, *self._rows("pages", keys.pages, _page_row)])

    def _msr_row(self, number: int, key: int, count: int, total_ns: int | None) -> MsrRow:
        write, msr = split_pair(key)
        direction = "write" if write else "read"
        return MsrRow(msr, describe_msr(msr), direction, count, self._msr_faults[number], total_ns)

    def _hypercall_rows(self, keys: LaneKeys) -> tuple[HypercallRow, ...]:
        others = [
            HypercallRow(interface, nr, "", counter[n], None)
            for interface, (index, counter) in self._other_hypercalls.items()
            for n, nr in enumerate(index.keys())
        ]
        timed = (
            *self._rows("hypercalls", keys.hypercalls, _hypercall_row),
            *self._rows("calls", keys.calls, _call_row),
        )
        return _sorted([*timed, *others])

    def _rip_rows(
        self, keys: LaneKeys, symbol: Callable[[int], str | None], limit: int
    ) -> tuple[tuple[RipRow, ...], LeftOut]:
        reasons, rips = keys.reasons.keys(), keys.rips.keys()
        sites = self._sites.keys()
        numbers = sorted(range(len(sites)), key=lambda n: (-self._site_ns[n], -self._site_count[n], sites[n]))
        rows = []
        for n in numbers[:limit]:
            key = rips[sites[n] >> REASON_BITS]
            rip = None if key == NOT_TOLD else key
            isa, reason = split_pair(reasons[sites[n] & REASON_MASK])
            rows.append(
                RipRow(
                    rip,
                    None if rip is None else symbol(rip),
                    isa_name(isa),
                    reason,
                    describe_exit_reason(isa, reason),
                    self._site_count[n],
                    self._site_ns[n],
                )
            )
        rest = numbers[limit:]
        total_ns = sum(self._site_ns[n] for n in rest)
        return tuple(rows), LeftOut(len(rest), sum(self._site_count[n] for n in rest), total_ns)


def _sorted(rows: list[Row]) -> tuple[Row, ...]:
    """Sort by time, then count, descending."""
    return tuple(sorted(rows, key=lambda row: (-(row.total_ns or 0), -row.count)))


def _rest(rows: Sequence[Any]) -> LeftOut:
    times = [ns for row in rows if (ns := getattr(row, "total_ns", None)) is not None]
    return LeftOut(len(rows), sum(row.count for row in rows), sum(times) if times else None)


def _port_row(number: int, key: int, count: int, total_ns: int | None) -> PortRow:  # noqa: ARG001
    write, port = split_pair(key)
    return PortRow(port, describe_port(port), "out" if write else "in", count, total_ns)


def _mmio_row(number: int, key: int, count: int, total_ns: int | None) -> GpaRow:  # noqa: ARG001
    return GpaRow(key >> 1, "mmio write" if key & 1 else "mmio read", count, total_ns)


def _page_row(number: int, key: int, count: int, total_ns: int | None) -> GpaRow:  # noqa: ARG001
    return GpaRow(key << PAGE_SHIFT, "page fault", count, total_ns)


def _cr_row(number: int, key: int, count: int, total_ns: int | None) -> CrRow:  # noqa: ARG001
    write, cr = split_pair(key)
    return CrRow(cr, "write" if write else "read", count, total_ns)


def _register_row(number: int, key: int, count: int, total_ns: int | None) -> SysregRow:  # noqa: ARG001
    write, register = split_pair(key)
    return SysregRow(register, describe_register(register), "write" if write else "read", count, total_ns)


def _call_row(number: int, key: int, count: int, total_ns: int | None) -> HypercallRow:  # noqa: ARG001
    return HypercallRow("smccc", key, describe_psci(key) or "", count, total_ns)


def _hypercall_row(number: int, key: int, count: int, total_ns: int | None) -> HypercallRow:  # noqa: ARG001
    return HypercallRow("kvm", key, describe_hypercall(key), count, total_ns)
