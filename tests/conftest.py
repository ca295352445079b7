"""For the whole session: tracefs is mounted as the product mounts it, so that no test is left out for want of it."""

from __future__ import annotations

import contextlib
import os

from kvmtrace.capture.tracefs import MOUNT_POINT, mount_tracefs
from kvmtrace.errors import CapabilityError


def pytest_configure() -> None:
    """Before the tests are collected: some ask at import time what this kernel's formats say."""
    if os.geteuid() == 0 and not (MOUNT_POINT / "events").is_dir():
        with contextlib.suppress(CapabilityError):
            mount_tracefs()
