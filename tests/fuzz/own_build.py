"""A copy of kvmtrace with a build of its own of the compiled loops: with sanitizers, with coverage.

Nothing in kvmtrace can be told to use another build. The copy stands in a folder that is first on the path of a
process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "kvmtrace"
EDGES = Path(__file__).parent / "block_counts.c"
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# without the runtime of the sanitizers, which would not leave the memory's limit in place: what is undefined ends with
# an illegal instruction
COVERAGE = ("-O1", "-g", "-fsanitize-coverage=trace-pc", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")


def own_build(
    folder: Path, flags: tuple[str, ...], change: tuple[str, str, str] | None = None, *, edges: bool = False
) -> Path:
    """Make a copy of kvmtrace whose loops are built with these flags.

    Parameters
    ----------
    change : file, text in it, what stands there instead
    edges : whether block_counts.c is part of it
    """
    copy = folder / "kvmtrace"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (folder / "fixtures").symlink_to(PACKAGE.parent / "fixtures")
    native = copy / "_native"
    if edges:
        shutil.copy(EDGES, native)
    if change is not None:
        name, old, new = change
        text = (native / name).read_text()
        assert old in text
        (native / name).write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("compiling", native / "compiling.py")
    assert spec is not None
    assert spec.loader is not None
    compiling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiling)
    compiling.build(native, flags=flags)
    return folder


def sanitizer_libraries() -> str:
    """Return what LD_PRELOAD needs for a Python that loads a library with sanitizers."""
    names = ("libasan.so", "libubsan.so")
    return " ".join(
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    )


def environment(folder: Path, *, sanitized: bool) -> dict[str, str]:
    """Return the environment of a process that uses the copy in `folder`."""
    made = os.environ | {
        "PYTHONPATH": str(folder),
        "PYTHONSAFEPATH": "1",  # the working directory's kvmtrace does not come first
        "SANITIZED": str(folder),
    }
    if sanitized:
        made |= {
            "LD_PRELOAD": sanitizer_libraries(),
            "ASAN_OPTIONS": "detect_leaks=0",
            # Python's own allocator would put small buffers side by side, without room between them to notice an
            # overrun
            "PYTHONMALLOC": "malloc",
        }
    return made


def count_blocks(library: Path) -> int:
    """Return how many basic blocks of a build with coverage are counted."""
    listing = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return sum("call" in line and "<__sanitizer_cov_trace_pc" in line for line in listing.splitlines())
