"""The newcomer's test: an exit reason is one row in one file, an ISA is one file and one line.

Each is added to a copy of the package and seen in what users run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parents[2] / "kvmtrace"

TOY_ROW = """
    _skip(76, "TOY_EXIT", "handle_toy (vmx/vmx.c)", (2, 2), kinds=("cpuid",),
          must=(Must(("kvm_cpuid",), (1, 1)),), note="A toy."),"""

TOY_ISA = '''"""A toy instruction set."""

from kvmtrace.isa.base import ExitRow, Isa, Must, Part, RipClass

TOY = Isa(
    name="toy",
    number=200,
    title="A toy",
    module="kvm_toy",
    rows=(
        ExitRow(7, "TRAP", "handle_toy_trap (toy/toy.c)", RipClass.ADVANCE, 4, 4, kinds=("halt",),
                must=(Must(("kvm_hypercall",), (1, 1)),), source="handle_toy_trap"),
        ExitRow(0x103, "IRQ", "handle_toy_irq (toy/toy.c)", RipClass.SAME, kinds=("asynchronous", "host"),
                source="handle_toy_irq"),
    ),
    hexadecimal=True,
    signature=frozenset({"cause", "class", "pc"}),
    derived={
        ("kvm_exit", "exit_reason"): (Part("cause", shift=8, mask=0xFF), Part("class", mask=0xFF)),
        ("kvm_exit", "guest_rip"): (Part("pc"),),
        ("kvm_entry", "rip"): (Part("pc"),),
    },
    control_structure="the toy's context",
    vcpu_object="struct toy_vcpu",
    follow_ups=("kvm_hypercall",),
)
'''


def line(number: int, text: str) -> str:
    return f" vmm-100  [000] d..1. 1.{number:06}000: {text}\n"


def story(*texts: str) -> str:
    """Return a text trace; the userspace exit before it says that such were recorded."""
    begun = ("kvm_userspace_exit: reason=5 errno=0", *texts)
    return "".join(line(number, text) for number, text in enumerate(begun, 1))


# one interpreter for all commands of a copy: a list of words in, [exit code, output] out, a line each
SERVER = """
import contextlib, io, json, sys
from kvmtrace.cli.main import main
for text in sys.stdin:
    code, out = 0, io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(json.loads(text))
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue()]), flush=True)
"""


class Copy:
    """A copy of the package that a newcomer changes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.server: subprocess.Popen[str] | None = None
        shutil.copytree(PACKAGE, home / "kvmtrace", ignore=shutil.ignore_patterns("__pycache__", "*.c", "*.h"))

    def change(self, name: str, old: str, new: str) -> None:
        path = self.home / "kvmtrace" / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))

    def run(self, *words: str, code: int = 0) -> str:
        if self.server is None:
            environment = {**os.environ, "PYTHONPATH": str(self.home), "NO_COLOR": "1"}
            self.server = subprocess.Popen(
                [sys.executable, "-c", SERVER], cwd=self.home, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(words) + "\n")
        self.server.stdin.flush()
        answered, output = json.loads(self.server.stdout.readline())
        assert answered == code, f"{answered}\n{output[-2000:]}"
        return str(output)

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate()

    def document(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.run(*words, "--format", "json", code=code))

    def broken_rules(self, name: str) -> set[str]:
        return {violation["rule"] for violation in self.document("check", name, code=1)["model"]["violations"]}


@pytest.fixture(scope="module")
def with_exit_reason(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    copy = Copy(tmp_path_factory.mktemp("reason"))
    copy.change("isa/vmx.py", "_ROWS: tuple[ExitRow, ...] = (", "_ROWS: tuple[ExitRow, ...] = (" + TOY_ROW)
    yield copy
    copy.close()


EXIT = "kvm_exit: exit_reason=76 guest_rip={:#x} isa=1 info1=0x0 info2=0x0 intr_info=0x0 error_code=0x0 vcpu_id=0"
CPUID = "kvm_cpuid: function=0 index=0 rax=d rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0"
ENTRY = "kvm_entry: vcpu_id=0 rip={:#x} immediate_exit=0"


def test_an_exit_reason_is_one_row(with_exit_reason: Copy) -> None:
    home = with_exit_reason.home
    (home / "good.txt").write_text(story(ENTRY.format(0x10), EXIT.format(0x10), CPUID, ENTRY.format(0x12)))
    (home / "untraced.txt").write_text(
        story(ENTRY.format(0x10), EXIT.format(0x10), CPUID, ENTRY.format(0x12), EXIT.format(0x20), ENTRY.format(0x22))
    )
    (home / "not-skipped.txt").write_text(story(ENTRY.format(0x10), EXIT.format(0x10), CPUID, ENTRY.format(0x40)))
    report = with_exit_reason.document("report", "good.txt")
    assert [(row["name"], row["exit_reason"], row["count"]) for row in report["exits"]] == [("TOY_EXIT", 76, 1)]
    assert "TOY_EXIT" in with_exit_reason.run("report", "good.txt")
    assert report["model"]["violations"] == []
    assert report["model"]["coverage"]["exit_reasons_seen"] == 1
    assert with_exit_reason.broken_rules("untraced.txt") == {"V4"}
    assert with_exit_reason.broken_rules("not-skipped.txt") == {"V6"}
    assert "TOY_EXIT (76)   handle_toy (vmx/vmx.c)" in with_exit_reason.run("model", "--isa", "vmx")


def test_an_exit_reason_is_read_by_its_name(with_exit_reason: Copy) -> None:
    entry = "kvm_entry: vcpu 0, rip 0x10"
    left = "kvm_exit: vcpu 0 reason TOY_EXIT rip 0x10 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0"
    (with_exit_reason.home / "named.txt").write_text(story(entry, left, "kvm_entry: vcpu 0, rip 0x12"))
    report = with_exit_reason.document("report", "named.txt")
    assert [(row["name"], row["exit_reason"], row["isa"]) for row in report["exits"]] == [("TOY_EXIT", 76, "vmx")]


@pytest.fixture(scope="module")
def with_isa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    copy = Copy(tmp_path_factory.mktemp("isa"))
    (copy.home / "kvmtrace" / "isa" / "toy.py").write_text(TOY_ISA)
    copy.change("isa/registry.py", "from kvmtrace.isa.vmx import VMX\n",
                "from kvmtrace.isa.vmx import VMX\nfrom kvmtrace.isa.toy import TOY\n")  # fmt: skip
    copy.change("isa/registry.py", "ISAS: tuple[Isa, ...] = (VMX", "ISAS: tuple[Isa, ...] = (TOY, VMX")
    yield copy
    copy.close()


OWN_EXIT = "kvm_exit: cause={} class={} pc={:#x}"
OWN_ENTRY = "kvm_entry: pc={:#x}"
TRAP = "kvm_hypercall: nr=1"


def test_an_isa_is_recognised_by_its_own_fields(with_isa: Copy) -> None:
    texts = [OWN_ENTRY.format(0x1000), OWN_EXIT.format(0, 7, 0x1000), TRAP, OWN_ENTRY.format(0x1004)]
    interrupted = [OWN_EXIT.format(1, 3, 0x2000), OWN_ENTRY.format(0x2000)]
    (with_isa.home / "own.txt").write_text(story(*texts, *interrupted))
    report = with_isa.document("report", "own.txt")
    rows = {row["name"]: row for row in report["exits"]}
    assert {name: (row["isa"], row["exit_reason"], row["samples"]) for name, row in rows.items()} == {
        "TRAP": ("toy", 7, 1),
        "IRQ": ("toy", 0x103, 1),
    }
    assert report["capture"]["isa"] == "toy"
    assert report["model"]["isa"] == "toy"
    assert report["model"]["violations"] == []
    assert {row["rip"] for row in report["detail"]["rips"]} == {0x1000, 0x2000}
    assert "TOY" in with_isa.run("report", "own.txt")
    assert "conforms" in with_isa.run("check", "own.txt")


def test_an_isa_is_checked(with_isa: Copy) -> None:
    again = [OWN_EXIT.format(0, 7, 0x1010), OWN_ENTRY.format(0x1014)]
    begin = [OWN_ENTRY.format(0x1000), OWN_EXIT.format(0, 7, 0x1000), TRAP, OWN_ENTRY.format(0x1004)]
    (with_isa.home / "untraced.txt").write_text(story(*begin, *again))
    (with_isa.home / "moved.txt").write_text(story(*begin, OWN_EXIT.format(1, 3, 0x2000), OWN_ENTRY.format(0x2004)))
    assert with_isa.broken_rules("untraced.txt") == {"V4"}
    assert with_isa.broken_rules("moved.txt") == {"V6"}


def test_an_isa_is_recognised_by_its_number(with_isa: Copy) -> None:
    left = "kvm_exit: exit_reason=7 guest_rip=0x1000 isa=200 vcpu_id=0"
    (with_isa.home / "number.txt").write_text(story(ENTRY.format(0x1000), left, TRAP, ENTRY.format(0x1004)))
    report = with_isa.document("report", "number.txt")
    assert [(row["name"], row["isa"]) for row in report["exits"]] == [("TRAP", "toy")]
    assert report["model"]["violations"] == []


def test_an_isa_is_shown_by_model(with_isa: Copy) -> None:
    text = with_isa.run("model", "--isa", "toy")
    assert "What each TOY exit owes" in text
    assert "TRAP (0x7)   handle_toy_trap (toy/toy.c)" in text
    assert "must: kvm_hypercall" in text
    assert "EPT" not in text.split("Rules\n")[0]
    assert with_isa.document("model", "--isa", "toy")["exits"].keys() == {"toy"}
    assert with_isa.run("model", "--isa", "toy", "--format", "svg").startswith("<svg")
