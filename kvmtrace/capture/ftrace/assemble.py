"""From spool to file. Every step can be repeated after a kill, and leads to the same file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.ftrace.trace_dat_writer import Tail, build_header, move_pages, trailer
from kvmtrace.capture.spool import PAGE_SIZE, Spool

if TYPE_CHECKING:
    from pathlib import Path

OUT = "out"


def seal(spool: Spool, tail: Tail, meta: dict[str, Any]) -> None:
    """Note in the spool all that the file needs: from here on `assemble` needs nothing else.

    Parameters
    ----------
    spool : Spool with its segments complete
    tail : Tail
    meta : capture metadata
    """
    segments = spool.segments()
    skips: dict[str, int] = spool.manifest.get("skips", {})
    lengths = {
        name: max(0, spool.size_of(name) // PAGE_SIZE * PAGE_SIZE - skips.get(name, 0))
        for names in segments.values()
        for name in names
    }
    sizes = {cpu: sum(lengths[name] for name in names) for cpu, names in segments.items()}
    header, offsets = build_header(spool.read_file("head"), tail, sizes)
    places, end = {}, len(header)
    for cpu, names in segments.items():
        at = offsets[cpu]
        for name in names:
            places[name] = at
            at += lengths[name]
        end = max(end, at)
    spool.release_reserve()
    spool.write_file("header", header)
    spool.write_file("trailer", trailer(meta))
    spool.save({"state": "sealed", "places": places, "end": end})


def assemble(spool: Spool, destination: str) -> Path:
    """Make the file of a sealed spool and put it in its place.

    Parameters
    ----------
    spool : Spool
    destination : str, name in the directory that holds the spool

    Raises
    ------
    OSError
        The disk is full or broken; the spool can be assembled later.
    """
    try:
        out = spool.open_old(OUT)
    except FileNotFoundError:
        out = spool.open_new(OUT)
    try:
        _write_at(out, spool.read_file("header"), 0)
        waiting = {name for names in spool.segments().values() for name in names}
        for name, offset in spool.manifest["places"].items():
            if name in waiting:
                move_pages(spool, name, out, offset, spool.manifest.get("skips", {}).get(name, 0))
        _write_at(out, spool.read_file("trailer"), spool.manifest["end"])
    finally:
        os.close(out)
    return spool.publish(OUT, destination)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
