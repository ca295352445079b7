"""Values of options: sizes, times, moments, ids, exit reasons."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    IntParam = click.ParamType[int]
    FloatParam = click.ParamType[float]
    MomentParam = click.ParamType[tuple[int, bool]]
    PartsParam = click.ParamType[tuple[str, ...]]
    AddressParam = click.ParamType[tuple[str, int]]
else:  # generic since click 8.4
    IntParam = FloatParam = MomentParam = PartsParam = AddressParam = click.ParamType

VM_HELP = "Only the VM with this name or uuid; NAME may be a pattern: 'web-*'."
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MAX_BYTES = 1 << 60
MAX_SECONDS = 366 * 24 * 3600.0
MAX_NUMBER = (1 << 31) - 1
MAX_PID = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h
TIME_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

ID = click.IntRange(1, 2**31 - 1)  # of a thread or process
MAX_NS = 2**62  # 146 years: what lies behind is a slip of the finger
NS = {"": 1_000_000_000, "s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}


class FiniteRange(click.FloatRange):
    """A number within bounds; what is no number ("nan") lies within none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


class Moment(MomentParam):
    """A time: "1.5", "20ms" after the recording's start, or "@123.456" as the trace's clock says."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, bool]:
        """Return (ns, relative to the start?)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(@?)(\d+)(?:\.(\d*))?(s|ms|us|ns)?", str(value).strip())
        if not match:
            self.fail(f"{value!r} is no time; examples: 1.5, 20ms, @123.456", param, ctx)
        absolute, whole, fraction, unit = match.groups()
        size = NS[unit or ""]
        fraction = (fraction or "")[:18]
        ns = int(whole[:30]) * size + int(fraction or 0) * size // 10 ** len(fraction)
        if ns > MAX_NS:
            self.fail(f"{value!r} is longer than any recording", param, ctx)
        return ns, not absolute


class Size(IntParam):
    """A number of bytes: 64M, 2G, 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)i?b?", str(value).strip().lower())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no size; write 64M or 2G", param, ctx)
        size = float(match[1]) * UNITS[match[2]]
        if size > MAX_BYTES:
            self.fail(f"{value!r} is more than there is anywhere", param, ctx)
        return int(size)


class ExitReason(FloatParam):
    """An exit reason: its number, or its name in any instruction set (HLT)."""

    name = "reason"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; a name that both instruction sets know is the one of the loaded KVM module."""
        from kvmtrace.isa.registry import ISAS

        text = str(value).strip()
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", text):
            number = int(text, 0) if text.isascii() and len(text) < 20 else -1
            if not 0 <= number < 1 << 32:
                self.fail(f"{value!r} is no exit reason: it has 32 bits", param, ctx)
            return number
        isas = sorted(ISAS, key=lambda isa: not Path("/sys/module", isa.module).is_dir())
        numbers = [number for isa in isas for number, name in isa.names.items() if name.lower() == text.lower()]
        if not numbers:
            examples = ", ".join(isa.names[isa.code_of("second_level_fault")] for isa in ISAS)
            self.fail(f"{value!r} is no exit reason; examples: {examples}, HLT, 48", param, ctx)
        return numbers[0]


class Duration(FloatParam):
    """A time: 10, 2.5s, 500ms, 3m."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is no time; write 10, 500ms or 3m", param, ctx)
        seconds = float(match[1]) * TIME_UNITS[match[2]]
        if seconds > MAX_SECONDS:
            self.fail(f"{value!r} is more than a year", param, ctx)
        return seconds


class Address(AddressParam):
    """Where to listen: HOST:PORT, [V6]:PORT, :PORT for this machine alone."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return the host and the port."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]\s]*)):(\d{1,5})", str(value).strip())
        if match is None or not 0 < int(match[3]) < 1 << 16:
            self.fail(f"{value!r} is no address; write 127.0.0.1:9794", param, ctx)
        return match[1] or match[2] or "127.0.0.1", int(match[3])


class Parts(PartsParam):
    """Names of parts, separated by commas."""

    name = "parts"

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(",") if name.strip())
        unknown = [name for name in names if name not in self._known]
        if unknown or not names:
            self.fail(f"{value!r}: the parts are {', '.join(self._known)}", param, ctx)
        return names
