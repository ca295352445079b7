"""Emulated hosts with real kvm_intel and kvm_amd.

`run_lab(Job(...))` runs a command there; see `kvmtrace lab run` for the command line.
"""

from __future__ import annotations

from kvmtrace.lab.emulator import LabFailedError
from kvmtrace.lab.job import Job
from kvmtrace.lab.run import LabResult, run_lab

__all__ = ["Job", "LabFailedError", "LabResult", "run_lab"]
