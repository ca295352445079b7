"""Emulated hosts with real kvm_intel and kvm_amd.

`run_lab(Job(...))` runs a command there, `record_in_lab([LabRecording(...)], Job(...))` records guests; `kvmtrace lab`
is the command line.
"""

from __future__ import annotations

from kvmtrace.lab.emulator import LabFailedError
from kvmtrace.lab.guest_recording import LabRecording, record_in_lab
from kvmtrace.lab.job import Job
from kvmtrace.lab.lab_run import LabResult, run_lab

__all__ = ["Job", "LabFailedError", "LabRecording", "LabResult", "record_in_lab", "run_lab"]
