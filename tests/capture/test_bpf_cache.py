"""Compiled programs are kept, found again, and filled in with what is known only at loading time."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture.bpf import compiler as bpf_compile

if TYPE_CHECKING:
    from pathlib import Path

LOAD = struct.pack("<BBhiBBhi", 0x18, 0x11, 0, 0x7E570001, 0, 0, 0, 0)  # r1 = map 0x7e570001
# an add of a constant that equals the placeholder is no load, and must stay
ADD = struct.pack("<BBhi", 0x07, 0x01, 0, 0x7E570001)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVMTRACE_BPF_CACHE", str(folder))
    return folder


def test_only_loads_are_relocated() -> None:
    code = bpf_compile.relocate({"f": LOAD + ADD + LOAD}, {0x7E570001: 42})["f"]
    changed = struct.pack("<BBhiBBhi", 0x18, 0x11, 0, 42, 0, 0, 0, 0)
    assert code == changed + ADD + changed


def test_a_map_is_a_relocatable_load() -> None:
    source = "int f(void *ctx) { u32 key = 0; return bpf_map_lookup_elem_(bpf_pseudo_fd(1, 0x7e570001), &key) != 0; }"
    code = bpf_compile.compile_source(source)["f"]
    assert LOAD in code
    assert LOAD not in bpf_compile.relocate({"f": code}, {0x7E570001: 9})["f"]


def test_what_was_compiled_once_is_not_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "int zero(void *ctx) { return 0; }"
    first = bpf_compile.compile_cached(source)
    monkeypatch.setattr(bpf_compile, "compile_source", lambda _: pytest.fail("compiled again"))
    assert bpf_compile.compile_cached(source) == first
    assert cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", ["", "[]", '{"zero": 5}', '{"zero": "no hex"}', "{"])
def test_a_damaged_entry_is_compiled_again(cache: Path, content: str) -> None:
    source = "int zero(void *ctx) { return 0; }"
    good = bpf_compile.compile_cached(source)
    (entry,) = cache.iterdir()
    entry.write_text(content)
    assert bpf_compile.compile_cached(source) == good
    assert json.loads(entry.read_text())


def test_a_cache_that_others_can_write_is_not_used(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    bpf_compile.compile_cached("int zero(void *ctx) { return 0; }")
    assert list(cache.iterdir()) == []
