"""QEMU's start: order and inheritance as registered, against the model's."""

from __future__ import annotations

import numpy as np

from kvmtrace.bring_up.vmm_start import chain_of, follow_vmm
from kvmtrace.kvm.vmm_symbols import VMM_FUNCTIONS
from kvmtrace.model.bring_up import VMM_ORDER
from kvmtrace.table.event_table import COMMON_DTYPES, EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload

TEXT = np.dtype("S32")


def table(*calls: tuple[str, dict[str, object]]) -> EventTable:
    names = list(dict.fromkeys(name for name, _ in calls))
    dtypes = {
        name: {f: TEXT if isinstance(v, bytes) else np.dtype(np.int64) for f, v in fields.items()}
        for name, fields in calls
    }
    kinds = [EventKind(name, "kvmtrace", dtypes[name]) for name in names]
    columns = {name: np.zeros(len(calls), dtype) for name, dtype in COMMON_DTYPES.items()}
    columns["ts_ns"] = np.arange(len(calls)) * 10
    columns["kind"] = np.array([names.index(name) for name, _ in calls], np.uint16)
    payloads = {
        i: ColumnPayload(
            {f: np.array([fields[f] for n, fields in calls if n == name], dtype) for f, dtype in dtypes[name].items()}
        )
        for i, name in enumerate(names)
    }
    return EventTable(columns, kinds, payloads)


def register(name: str, parent: str) -> tuple[str, dict[str, object]]:
    return "vmm_type_register", {"qom_type": name.encode(), "parent": parent.encode()}


GOOD = (
    register("accel", "object"),
    register("kvm-accel", "accel"),
    ("vmm_accel_find", {"accel": b"kvm"}),
    ("vmm_accel_init_machine", {}),
    ("vmm_accel_init_machine_return", {"ret": 0}),
    ("vmm_board_init", {}),
)


def test_a_start_in_order() -> None:
    made = follow_vmm(table(*GOOD), {})
    assert made is not None
    assert made.findings == ()
    assert made.inheritance == (("kvm-accel", "accel", "object"),)
    assert made.n_types == 2
    assert [step.role for step in made.steps] == [name for name, _ in GOOD[2:]]
    assert made.steps[0].argument == "accel kvm"
    assert made.steps[2].argument == "ret 0"


def test_a_start_out_of_order_is_named() -> None:
    made = follow_vmm(table(("vmm_board_init", {}), *GOOD[:-1]), {})
    assert made is not None
    assert any("vmm_board_init came before" in finding for finding in made.findings)


def test_ioctls_take_part_in_the_order() -> None:
    made = follow_vmm(table(*GOOD), {"KVM_CREATE_VM": 0})
    assert made is not None
    assert any("KVM_CREATE_VM came before vmm_accel_init_machine" in finding for finding in made.findings)


def test_another_inheritance_is_named() -> None:
    made = follow_vmm(table(register("kvm-accel", "object"), *GOOD[2:]), {})
    assert made is not None
    assert any("kvm-accel → object was registered" in finding for finding in made.findings)


def test_a_type_that_is_its_own_ancestor_ends_the_chain() -> None:
    assert chain_of("a", {"a": "b", "b": "a"}) == ("a", "b")


def test_without_probes_there_is_nothing() -> None:
    assert follow_vmm(table(("kvm_exit", {})), {}) is None


def test_the_order_names_known_probes() -> None:
    roles = {function.role for function in VMM_FUNCTIONS}
    assert {name for pair in VMM_ORDER for name in pair if name.startswith("vmm_")} <= roles


def test_an_accelerator_that_fails_gives_way_to_the_next_of_the_list() -> None:
    find, init, done = "vmm_accel_find", "vmm_accel_init_machine", "vmm_accel_init_machine_return"
    made = follow_vmm(
        table(
            (find, {"accel": b"kvm"}),
            (find, {"accel": b"tcg"}),
            (find, {"accel": b"kvm"}),
            (init, {}),
            (done, {"ret": -13}),
            (find, {"accel": b"tcg"}),
            (init, {}),
            (done, {"ret": 0}),
        ),
        {},
    )
    assert made is not None
    assert [tried.sentence for tried in made.accelerators] == [
        "kvm failed to initialise (EACCES: Permission denied)",
        "tcg was taken",
    ]
    assert made.findings == ()


def test_an_accelerator_still_at_it_is_not_said_to_be_taken() -> None:
    made = follow_vmm(table(("vmm_accel_find", {"accel": b"kvm"}), ("vmm_accel_init_machine", {})), {})
    assert made is not None
    assert [(tried.name, tried.ret) for tried in made.accelerators] == [("kvm", None)]
