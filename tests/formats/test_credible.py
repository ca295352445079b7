"""Fields that analyses read as numbers are numbers in a file's format texts, or count as not recorded."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import kvmtrace
from kvmtrace.table.credible import BYTES, FLAGS, NUMBERS, TEXTS, is_credible

PACKAGE = Path(kvmtrace.__file__).parent
READERS = ("ab", "bring_up", "check", "fleet", "isa", "model", "predict", "report", "spans", "stats")
READ = re.compile(
    r"""["|]((?:kvm|sched)_\w+)\.(\w+)(?=["|])"""  # a need
    r"""|\.(?:values|values_or|field|has_field)\(\s*(?:"(\w+)"|\w+),\s*"(\w+)\""""
)
OTHERS = {"text", "vectoring"}  # what is left of the own text of an event; a need that stands for the field of an ISA


def test_every_field_that_is_read_has_a_kind_of_type() -> None:
    read = {
        match[2] or match[4]
        for folder in READERS
        for path in (PACKAGE / folder).rglob("*.py")
        for match in READ.finditer(path.read_text())
    }
    assert {"guest_rip", "hxfar", "insn"} <= read
    assert read - (NUMBERS | FLAGS | TEXTS | BYTES) == OTHERS & read


def test_of_other_types_they_are_not_credible() -> None:
    for name in NUMBERS | FLAGS:
        assert is_credible("kvm", name, np.dtype(np.uint64))
        for dtype in (np.dtype("S8"), np.dtype((np.uint8, (8,)))):
            assert not is_credible("kvm", name, dtype)
            assert is_credible("irq", name, dtype)
