"""Builds kvm's modules with one historic fault each, all from one tree, so that each costs a compilation or two."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from faults.build import MODULES, SERIES, clean_build, make_modules, relocate, strip_module
from faults.catalogue import apply_edit

from kvmtrace.lab.cache import cache_dir, cached, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from faults.catalogue import Edit

Variant = tuple["Edit", ...]


class Tree:
    """A built source tree that is changed, built again and put back as it was, time stamps included."""

    def __init__(self, folder: Path) -> None:
        self.source, self.kept = folder / "source", folder / "kept"
        clean = clean_build()
        shutil.copytree(clean, self.source, copy_function=shutil.copy2)
        relocate(self.source, clean)
        shutil.copytree(self.source, self.kept, copy_function=shutil.copy2)

    def build(self, edits: Sequence[Edit], target: Path) -> None:
        """Write the three modules with these edits into `target`."""
        since = time.time_ns()
        try:
            for edit in edits:
                apply_edit(self.source, edit)
            make_modules(self.source)
            for name in MODULES:
                strip_module(self.source / "arch/x86/kvm" / name, target / name)
        finally:
            self._restore(since)

    def _restore(self, since: int) -> None:
        """Bring back what was written since then."""
        for path in sorted(self.source.rglob("*")):
            before = self.kept / path.relative_to(self.source)
            if path.is_file() and (not before.exists() or path.stat().st_mtime_ns >= since):
                path.unlink()
        for before in self.kept.rglob("*"):
            path = self.source / before.relative_to(self.kept)
            if before.is_file() and not path.exists():
                shutil.copy2(before, path)


def _name(edits: Sequence[Edit]) -> str:
    return f"history-{digest([clean_build().name, SERIES, *(text for edit in edits for text in astuple(edit))])}"


def build_variants(variants: Iterable[Variant], said: Callable[[str], object] = str) -> dict[Variant, Path]:
    """Return the directory of the modules of each variant; () is the source as it is.

    Parameters
    ----------
    said : told of each variant that has to be built
    """
    wanted = dict.fromkeys(variants)
    missing = [edits for edits in wanted if not (cache_dir() / _name(edits)).exists()]
    if missing:
        with tempfile.TemporaryDirectory(prefix="history-") as folder:
            tree = Tree(Path(folder))
            for i, edits in enumerate(missing, 1):
                said(f"building {i} of {len(missing)}: {edits[0].function if edits else 'the source as it is'}")
                cached(_name(edits), lambda work, edits=edits: tree.build(edits, work))  # type: ignore[misc]
    return {edits: cached(_name(edits), lambda work, edits=edits: None) for edits in wanted}  # type: ignore[misc]
