"""One test of a suite, wherever the suite lists it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SuiteTest:
    """One test.

    Parameters
    ----------
    name : str, unique in its suite
    argv : what is executed
    timeout_s : its own limit; None: the suite's
    skip : why it is not run; "" if it is
    """

    name: str
    argv: tuple[str, ...]
    timeout_s: float | None = None
    skip: str = ""
