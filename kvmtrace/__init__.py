"""kvmtrace: trace-driven analysis of KVM, compared with an executable reference model.

>>> import kvmtrace
>>> rec = kvmtrace.load("run.dat")  # doctest: +SKIP
>>> rec.vm_exits.groupby("name").dur_ns.describe()  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LoadedRecording", "load", "load_fleet", "load_ipython_extension"]

if TYPE_CHECKING:
    from kvmtrace.api import LoadedRecording, load
    from kvmtrace.fleet.reduce import load_fleet
    from kvmtrace.magic import load_ipython_extension

_HOME = {"load": "api", "LoadedRecording": "api", "load_fleet": "fleet.reduce", "load_ipython_extension": "magic"}


def __dir__() -> list[str]:
    """Name what is public, as it is imported only on use."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    """Import pandas and the analysis only for those who use them: recording must start fast."""
    if name not in _HOME:
        raise AttributeError(f"module kvmtrace has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"kvmtrace.{_HOME[name]}"), name)
