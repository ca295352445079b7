"""Which CPUs' pages lie where those of another do: a damaged table, which would be decoded as often as it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmtrace.formats.trace_dat.trace_dat_sections import CpuData, TraceDat


def overlapping(trace: TraceDat) -> dict[tuple[int, int], CpuData]:
    """Return (buffer, position in it) of each CPU whose pages begin within another's -> that other one.

    Of several the one that begins first counts.
    """
    areas = sorted(
        (cpu.offset, cpu.offset + cpu.size, number, position)
        for number, buffer in enumerate(trace.buffers)
        for position, cpu in enumerate(buffer.cpus)
        if cpu.size
    )
    found: dict[tuple[int, int], CpuData] = {}
    end, owner = -1, None
    for begin, stop, number, position in areas:
        if owner is not None and begin < end:
            found[number, position] = owner
        else:
            end, owner = stop, trace.buffers[number].cpus[position]
    return found
