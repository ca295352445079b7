"""Time that grows no faster than what it is spent on: four times as much takes at most five times as long.

Processors tell how long something took, and on a busy machine they tell it badly: what another process leaves in the
caches alone may be worth a third. A single pair of sizes therefore decides nothing. The best of several runs of each
is taken, and what looks too long is measured again at twice and four times the size: what is quadratic takes sixteen
times as long there, too, and what was disturbed does not.
"""

from __future__ import annotations

import contextlib
import gc
import time
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import KvmtraceError

if TYPE_CHECKING:
    from collections.abc import Callable

FACTOR, TIMES = 4, 5
FLOOR_S = 0.1  # below it nothing is measured: caches, collectors, an allocation
ROUNDS, SIZES = 5, (1, 2, 4)


def seconds(use: Callable[[Any], object], made: Any) -> float:
    """Return the CPU time of one use; refusing is an answer, too."""
    gc.disable()  # its runs grow with all that other tests left
    begin = time.process_time()
    try:
        with contextlib.suppress(KvmtraceError):
            use(made)
    finally:
        gc.enable()
    return time.process_time() - begin


def _is_linear(use: Callable[[Any], object], small: Any, large: Any) -> tuple[bool, float, float]:
    best_small = best_large = float("inf")
    for _ in range(ROUNDS):
        best_small, best_large = min(best_small, seconds(use, small)), min(best_large, seconds(use, large))
        if best_large <= TIMES * best_small or best_large < FLOOR_S:
            return True, best_small, best_large
    return False, best_small, best_large


def assert_linear(make: Callable[[int], Any], use: Callable[[Any], object], n: int) -> None:
    """See that `use(make(FACTOR * n))` takes at most TIMES as long as `use(make(n))`.

    Parameters
    ----------
    make : number of something -> what contains as many
    use : what is measured
    """
    measured = []
    for times in SIZES:
        linear, small, large = _is_linear(use, make(times * n), make(FACTOR * times * n))
        if linear:
            return
        measured.append(f"{small:.2f} s -> {large:.2f} s")
    raise AssertionError(f"{FACTOR} times as much takes more than {TIMES} times as long: {', '.join(measured)}")
