"""Event classes: the model's alphabet as small numbers, so that columns of events can be looked up.

Class 0 is every event that the model does not track. Steps come first, then the follow-ups of exits, then
bystanders; a class is also a bit of a 64-bit mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS, STEPS
from kvmtrace.table.event_table import TRACE_FLAG_HARDIRQ, TRACE_FLAG_NMI, TRACE_FLAG_SOFTIRQ

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

CLASS_NAMES: tuple[str, ...] = ("", *STEPS, *FOLLOW_UPS, *BYSTANDERS)
CLASS: dict[str, int] = {name: number for number, name in enumerate(CLASS_NAMES)}
N_CLASSES = len(CLASS_NAMES)
N_STEPS = len(STEPS)  # classes 1..N_STEPS
assert N_CLASSES <= 64, "a class must fit a 64-bit mask"

ENTRY = CLASS["VM-entry"]
EXIT = CLASS["VM-exit"]
USERSPACE = CLASS["userspace exit"]
INTERRUPT_CONTEXT = TRACE_FLAG_HARDIRQ | TRACE_FLAG_SOFTIRQ | TRACE_FLAG_NMI


def mask_of(*names: str) -> np.uint64:
    """Return the mask of these classes."""
    return np.uint64(sum(1 << CLASS[name] for name in names))


FOLLOW_UP_MASK = mask_of(*FOLLOW_UPS)


def _conditional(table: EventTable, kind: str) -> NDArray[np.uint8]:
    """Return the class of each event of a kind whose class depends on a field; 0 without that field."""
    classes = np.zeros(table.count(kind), np.uint8)
    for name, step in STEPS.items():
        field, value = step.condition
        if step.kind != kind or not table.has(kind, field.removesuffix("!=")):
            continue
        values = table.field(kind, field.removesuffix("!=")).astype(np.int64) & 0xFFFFFFFF
        classes[values != value if field.endswith("!=") else values == value] = CLASS[name]
    return classes


def classify(table: EventTable) -> NDArray[np.uint8]:
    """Return the class of every event; interrupt context has class 0, as its thread did not do it.

    Returns
    -------
    ndarray of uint8, shape (len(table),)
    """
    by_kind: NDArray[Any] = np.zeros(max(len(table.kinds), 1), np.uint8)
    conditional = {step.kind for step in STEPS.values() if step.condition[0]}
    for name in (*FOLLOW_UPS, *BYSTANDERS):
        if name in table.kind_index:
            by_kind[table.kind_index[name]] = CLASS[name]
    for name, step in STEPS.items():
        if step.kind in table.kind_index and step.kind not in conditional:
            by_kind[table.kind_index[step.kind]] = CLASS[name]
    classes: NDArray[np.uint8] = by_kind.take(table.kind)  # several times as fast as an index of 16 bits
    for kind in conditional & table.kind_index.keys():
        classes[table.rows(kind)] = _conditional(table, kind)
    classes[(table.irq_flags & INTERRUPT_CONTEXT) != 0] = 0
    return classes
