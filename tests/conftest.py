"""For the whole session: tracefs is mounted, and what uses this machine's KVM runs one at a time, also under xdist."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture.tracefs import MOUNT_POINT, mount_tracefs
from kvmtrace.errors import CapabilityError

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure() -> None:
    """Begin as on a terminal, whatever started the tests, and with tracefs mounted.

    Under nohup, or in a background job, hang-ups and interrupts are ignored, which programs that the tests start would
    inherit. tracefs is mounted as the product does it, before the tests are collected: some ask at import time for
    formats.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() == 0 and not (MOUNT_POINT / "events").is_dir():
        with contextlib.suppress(CapabilityError):
            mount_tracefs()


@pytest.fixture(autouse=True)
def _alone_with_kvm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep another worker's guests out of what a test records or counts on the whole machine."""
    if request.node.get_closest_marker("kvm") is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with (tmp_path_factory.getbasetemp().parent / "kvm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
