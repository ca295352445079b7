"""The model as text and JSON."""

from __future__ import annotations

import json

import pytest

from kvmtrace.check.rule_registry import all_rules
from kvmtrace.isa.registry import BY_NAME, NAMES
from kvmtrace.model.states import STATES
from kvmtrace.model.transitions import TRANSITIONS
from kvmtrace.render.model.describe import SCHEMA, model_as_dict, render_text


def test_json_holds_every_table() -> None:
    document = json.loads(json.dumps(model_as_dict()))
    assert document["schema"] == SCHEMA
    assert len(document["transitions"]) == len(TRANSITIONS)
    assert set(document["states"]) == set(STATES)
    assert set(document["rules"]) == set(all_rules())
    assert [row["code"] for row in document["exits"]["vmx"]] == list(BY_NAME["vmx"].exits)
    assert len(document["exits"]["svm"]) == len(BY_NAME["svm"].exits)
    cpuid = next(row for row in document["exits"]["vmx"] if row["name"] == "CPUID")
    assert cpuid["must"][0]["events"] == ["kvm_cpuid"]
    assert set(document["world_switch"]) == set(NAMES)


def test_one_isa_only() -> None:
    assert set(model_as_dict(["svm"])["exits"]) == {"svm"}
    text = render_text(["svm"])
    assert "io_interception" in text
    assert "handle_ept_violation (vmx/vmx.c)" not in text.split("Rules\n")[0]


@pytest.mark.parametrize("isa", ["vmx", "svm"])
def test_text_fits_100_columns_and_names_everything(isa: str) -> None:
    text = render_text([isa])
    assert max(map(len, text.splitlines())) <= 100
    for words in (*STATES, *all_rules(), "guest mode", "kvm_emulate_cpuid", "KVM_EXIT_MMIO", "must: kvm_page_fault"):
        assert words in text
