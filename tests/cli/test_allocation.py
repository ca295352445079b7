"""Freed memory is used again, so that arrays of one size do not fault in new pages each time."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, sys
import numpy as np
from kvmtrace.cli.allocation import prepare_memory
if sys.argv[1] == "kept":
    prepare_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    for _ in range(5):
        arrays = [np.ones(1 << 19) for _ in range(4)]
use()
before = faults()
use()
print(faults() - before)
"""


def faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_arrays_are_made_from_memory_that_was_freed():
    assert faults("kept") * 5 < faults("as ever")
