"""The programs that labs are made of: what is missing is told with its package, and set-up installs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.errors import CapabilityError
from kvmtrace.lab.tools import PACKAGES, find_program

MAKEFILE = Path(__file__).parents[2] / "Makefile"
ALWAYS_THERE = {"apt", "dpkg", "util-linux"}


def test_set_up_installs_what_a_remedy_names() -> None:
    lists = re.findall(r"^\w+_PACKAGES := ((?:.*\\\n)*.*)", MAKEFILE.read_text(), re.MULTILINE)
    installed = {name for words in lists for name in words.replace("\\\n", " ").split()}
    assert set(PACKAGES.values()) - ALWAYS_THERE <= installed
    assert {"bc", "bison", "flex", "libc6-dev-arm64-cross"} <= installed  # for kernels and selftests of arm64


@pytest.mark.parametrize("program", ["qemu-system-aarch64", "aarch64-linux-gnu-gcc", "flex"])
def test_a_missing_program_names_its_package(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    package = {"qemu-system-aarch64": "qemu-system-arm", "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu"}
    with pytest.raises(CapabilityError) as caught:
        find_program(program)
    assert caught.value.remedy == f"apt-get install {package.get(program, program)}"
