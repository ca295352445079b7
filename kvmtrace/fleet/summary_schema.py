"""The summary of one recording as a Parquet object, "kvmtrace.fleet/1": one row, everything that adds up in lists.

Counts and sums are integers and add exactly; an absent value is null, never 0. `level` is 1 or 2 (nested guest), null
where the recording does not tell. Histograms are parallel lists: `buckets` (see stats/exponential_histogram.py) and
`counts`. Lists of ports, MSRs and guest addresses hold the TOP most frequent rows; the rest stands in one row whose
key is null.
"""

from __future__ import annotations

import pyarrow as pa

from kvmtrace.spans.time_parts import EXIT_PARTS

SCHEMA = "kvmtrace.fleet/1"
TOP = 100  # rows of each list of ports, MSRs, guest addresses
FINDINGS = 3  # of each rule

_DURATIONS = [
    ("samples", pa.int64()),
    ("total_ns", pa.int64()),
    ("min_ns", pa.int64()),
    ("max_ns", pa.int64()),
]
# fmt: off
EXIT = pa.struct([
    ("vm_pid", pa.int64()), ("vcpu_id", pa.int32()), ("tid", pa.int32()), ("level", pa.int8()),
    ("isa", pa.string()), ("exit_reason", pa.int64()), ("name", pa.string()),
    ("count", pa.int64()), *_DURATIONS, ("squares_ns2", pa.decimal128(38, 0)),
    ("to_userspace", pa.int64()), ("guest_before_ns", pa.int64()),
    *((part, pa.int64()) for part in EXIT_PARTS),
    ("buckets", pa.list_(pa.int16())), ("counts", pa.list_(pa.int64())),
])
USERSPACE_EXIT = pa.struct([
    ("reason", pa.int64()), ("name", pa.string()), ("errno", pa.int32()), ("count", pa.int64()), *_DURATIONS,
])
BUDGET_PARTS = ("guest_ns", "entry_exit_ns", "handler_ns", "userspace_ns", "blocked_ns", "halt_poll_ns", "preempted_ns",
                "unknown_ns")
VCPU = pa.struct([
    ("vm_pid", pa.int64()), ("vcpu_id", pa.int32()), ("tid", pa.int32()), ("wall_ns", pa.int64()),
    *((part, pa.int64()) for part in BUDGET_PARTS),
    ("exits", pa.int64()), ("userspace_exits", pa.int64()), ("migrations", pa.int64()),
])
VM = pa.struct([("pid", pa.int64()), ("comm", pa.string()), ("name", pa.string()), ("uuid", pa.string())])
PORT = pa.struct([("port", pa.int64()), ("name", pa.string()), ("direction", pa.string()),
                  ("count", pa.int64()), ("total_ns", pa.int64())])
MSR = pa.struct([("msr", pa.int64()), ("name", pa.string()), ("direction", pa.string()),
                 ("count", pa.int64()), ("faults", pa.int64()), ("total_ns", pa.int64())])
GPA = pa.struct([("gpa", pa.uint64()), ("kind", pa.string()), ("count", pa.int64()), ("total_ns", pa.int64())])
RULE = pa.struct([("rule", pa.string()), ("checked", pa.int64()), ("held", pa.int64()),
                  ("violated", pa.int64()), ("unknown", pa.int64())])
FINDING = pa.struct([
    ("rule", pa.string()), ("severity", pa.string()), ("ts_ns", pa.int64()), ("tid", pa.int32()),
    ("vcpu_id", pa.int32()), ("event_index", pa.int64()), ("event", pa.string()),
    ("expected", pa.string()), ("observed", pa.string()),
    ("source", pa.string()), ("vm_exit", pa.int64()),
])
CALL = pa.struct([("name", pa.string()), ("dur_ns", pa.int64()), ("ret", pa.int64()), ("verdict", pa.string())])
LOSS = pa.struct([("events", pa.int64()), ("truncated", pa.bool_()), ("discarded_intervals", pa.int64()),
                  ("damaged_places", pa.int64())])
COVERAGE = pa.struct([(name, pa.int32()) for name in (
    "states_seen", "states_in_model", "transitions_seen", "transitions_in_model", "exit_reasons_seen",
    "exit_reasons_in_model")])

SUMMARY = pa.schema([
    ("schema", pa.string()), ("kvmtrace", pa.string()), ("checksum", pa.string()), ("source", pa.string()),
    ("host", pa.string()), ("kernel", pa.string()), ("cpu_model", pa.string()), ("isa", pa.string()),
    ("n_cpus", pa.int32()), ("format", pa.string()), ("backend", pa.string()), ("events", pa.list_(pa.string())),
    ("started", pa.string()), ("day", pa.string()), ("start_ns", pa.int64()), ("duration_ns", pa.int64()),
    ("n_events", pa.int64()), ("loss", LOSS),
    ("vms", pa.list_(VM)), ("vcpus", pa.list_(VCPU)), ("exits", pa.list_(EXIT)),
    ("userspace_exits", pa.list_(USERSPACE_EXIT)), ("ports", pa.list_(PORT)), ("msrs", pa.list_(MSR)),
    ("gpas", pa.list_(GPA)), ("calls", pa.list_(CALL)),
    ("rules", pa.list_(RULE)), ("findings", pa.list_(FINDING)), ("coverage", COVERAGE),
    ("violations", pa.int64()), ("suspicions", pa.int64()),
    ("explained_events", pa.int64()), ("unknown_events", pa.int64()),
])
FAILURE = pa.schema([("source", pa.string()), ("error", pa.string()), ("kind", pa.string()), ("attempts", pa.int32())])
# fmt: on
