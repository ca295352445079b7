"""Interrupts as they arrive at the LAPICs: kvm_apic_accept_irq, of whatever thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.injection import IRR_DELIVERY_MODES
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

_ROW_BITS = 40


@dataclass(frozen=True, eq=False)
class Arrivals:
    """What arrived, by vCPU and then by row of the table.

    Parameters
    ----------
    key : int64, ascending: vCPU << 40 | row
    row : intp, row of the table
    vector : int64
    plain : bool, delivered as an interrupt; else NMI, SMI, INIT, SIPI or a kick
    """

    key: NDArray[np.int64]
    row: NDArray[np.intp]
    vector: NDArray[np.int64]
    plain: NDArray[np.bool_]

    def before(self, vcpu: NDArray[np.int64], row: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return how many arrivals stand before a row of a vCPU: an index into the columns."""
        return np.searchsorted(self.key, vcpu << _ROW_BITS | row)


def arrivals(excerpt: Excerpt) -> Arrivals:
    """Return the arrivals of an excerpt's table; an APIC's id is taken for the vCPU's number."""
    return excerpt.once("arrivals", _arrivals)


def _arrivals(excerpt: Excerpt) -> Arrivals:
    table, kind = excerpt.whole.table, "kvm_apic_accept_irq"
    rows = table.rows(kind)
    vcpu = table.field(kind, "apicid").astype(np.int64)
    key = vcpu << _ROW_BITS | rows
    order = np.argsort(key, kind="stable")
    plain = among(table.field(kind, "dm").astype(np.int64), IRR_DELIVERY_MODES)
    vector = table.field(kind, "vec").astype(np.int64)
    return Arrivals(key[order], rows[order], vector[order], plain[order])
