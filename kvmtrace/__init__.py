"""kvmtrace: trace-driven analysis of KVM, compared with an executable reference model.

>>> import kvmtrace
>>> rec = kvmtrace.load("run.dat")  # doctest: +SKIP
>>> rec.vm_exits.groupby("name").dur_ns.describe()  # doctest: +SKIP
"""

from __future__ import annotations

__version__ = "0.1.0"
