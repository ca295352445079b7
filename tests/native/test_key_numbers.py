"""Dense numbers for keys: as a dictionary gives them, also for keys made to collide, in time linear in their number."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace._native.key_numbers import KeyNumbers

KEYS = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1), st.integers(0, 255).map(lambda n: n << 56))


@given(st.lists(st.lists(KEYS, max_size=150), max_size=6))
@settings(max_examples=200, deadline=None)
def test_as_a_dictionary_numbers_them(parts):
    numbers, known = KeyNumbers(), {}
    for part in parts:
        expected = [known.setdefault(key, len(known)) for key in part]
        assert numbers.number(np.array(part, np.uint64)).tolist() == expected
    assert numbers.known().tolist() == list(known)
    assert len(numbers) == len(known)


def test_time_is_nowhere_near_quadratic():
    def seconds(n: int) -> float:
        keys = np.arange(n, dtype=np.uint64) << np.uint64(40)  # a plain multiplicative hash would pile these up
        began = time.process_time()
        assert len(KeyNumbers().number(keys)) == n
        return time.process_time() - began

    small, large = (min(seconds(n) for _ in range(3)) for n in (100_000, 400_000))
    assert large < 12 * small + 0.1  # keys that pile up would take minutes
