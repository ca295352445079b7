"""Only isa/ names a vendor: the words of one elsewhere are found among the tokens of the code.

Comments and docstrings may name anything. So may prose in a string cite KVM's functions and files ("handle_io
(vmx/vmx.c)"): that is where a fact comes from, not a decision.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kvmtrace.isa.registry import ISAS

PACKAGE = Path(__file__).parents[2] / "kvmtrace"
# isa: its place. lab, workload: hosts and guests of one ISA each. capture: probes on KVM's own structures. The numbers
# of registers, the fields of events and the symbols of VMMs are vocabulary, whosever they are
ALLOWED = {"isa", "lab", "workload", "capture", "cli/lab.py", "kvm/msrs.py", "kvm/vmm_symbols.py"}
WORDS = re.compile(r"(?<![a-z])(vmx|svm|ept|npf|vmcs|vmcb)(?![a-z])", re.IGNORECASE)
CITATION = re.compile(
    r"\b\w+(?:,? \w+)* \((?:arch/\w+/kvm/)?\w+/\w+\.[cSh][^)]*\)|\b_*(?:vmx|svm|npf)_\w+\b|\b\w+_(?:vmx|npf|ept)_\w+\b"
)


def modules() -> list[Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    allowed = {part for part in ALLOWED if "/" not in part}
    names = [(path, path.relative_to(PACKAGE)) for path in paths]
    return [path for path, name in names if name.parts[0] not in allowed and str(name) not in ALLOWED]


def _docstrings(tree: ast.AST) -> set[int]:
    """Return the ids of the constants that are docstrings, of attributes too."""
    found = set()
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                found.add(id(statement.value))
    return found


def _names(node: ast.AST) -> list[str]:
    """Return the identifiers that a node itself holds."""
    words = [getattr(node, name, None) for name in ("id", "attr", "name", "arg", "module", "asname")]
    return [word for word in words if isinstance(word, str)]


def vendor_words(source: str) -> list[str]:
    """Return the identifiers and strings of a module that name a vendor."""
    tree = ast.parse(source)
    docstrings = _docstrings(tree)
    found = []
    for node in ast.walk(tree):
        words = _names(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            # one word is a name that code looks for; prose cites
            words.append(CITATION.sub("", node.value) if " " in node.value else node.value)
        found += [f"line {getattr(node, 'lineno', 0)}: {word}" for word in words if WORDS.search(word)]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_vendor_outside_isa(path: Path) -> None:
    assert vendor_words(path.read_text()) == []


def test_the_search_finds_what_it_should() -> None:
    assert vendor_words('"""VMX."""\nX = 1  # svm\n') == []
    assert vendor_words('SOURCE = "handle_io, handle_cr (vmx/vmx.c); svm_handle_exit (svm/svm.c, 6.5)"') == []
    for code in ('ISA_VMX = 1', 'x = isa == "vmx"', "x.svm_vcpu_run", 'KINDS = ("svm_vcpu_run",)', "def is_npf(): ...",
                 'x = "before 6.5 on SVM"', "from kvmtrace.isa.vmx import VMX_EXITS"):  # fmt: skip
        assert vendor_words(code), code


def test_no_module_or_folder_is_called_after_an_isa() -> None:
    names = {isa.name for isa in ISAS}
    assert not [path for path in modules() if names & set(re.split(r"[_.]", path.name))]


# what an ISA puts into these fields, bit by bit, only its decoders know; formats/ only moves them
EXIT_FIELDS = {
    "info1",
    "info2",
    "intr_info",
    "exit_qualification",
    "vectoring_field",
    "fault_address_field",
    "hsr",
    "esr",
}
BITS = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.LShift, ast.RShift)
UINT32 = 0xFFFFFFFF  # widths are no bit positions


def bits_of_exit_fields(source: str) -> list[str]:
    """Return the expressions of a module that take single bits of an exit's fields."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, BITS):
            continue
        inner = list(ast.walk(node))
        words = {word for child in inner for word in _names(child)}
        words |= {child.value for child in inner if isinstance(child, ast.Constant) and isinstance(child.value, str)}
        numbers = {child.value for child in inner if isinstance(child, ast.Constant) and isinstance(child.value, int)}
        if words & EXIT_FIELDS and numbers - {UINT32}:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_bit_of_an_exits_fields_is_known_outside_isa(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] != "formats":
        assert bits_of_exit_fields(path.read_text()) == []


def test_bits_are_found() -> None:
    assert bits_of_exit_fields('x = exit["info1"] & 0xFFFFFFFF') == []
    for code in (
        'x = exit["info1"] >> 16',
        "x = row.intr_info & 0x80000000",
        "x = (self.get(isa.vectoring_field) & 0xFF) == 3",
    ):
        assert bits_of_exit_fields(code), code
