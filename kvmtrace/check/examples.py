"""Short traces in rule files: one event a line, as text traces spell it, without thread, CPU, flags and time.

    kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1
    [1] kvm_entry: rip=0x1000            on CPU 1
    (200) kvm_inj_virq: vector=0x30      traced by thread 200
    +2s                                  two seconds later
    3 times:                             what is indented follows so often
      kvm_cpuid: function=0

Thread 100 on CPU 0 is the rule; kvm_entry and kvm_exit are traced with interrupts off; a microsecond lies between two
events.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_EVENT = re.compile(r"(?:\[(?P<cpu>\d+)\] )?(?:\((?P<tid>\d+)\) )?(?P<event>\w+): ?(?P<fields>.*)")
_IRQS_OFF = ("kvm_entry", "kvm_exit")


def text_trace(example: str) -> str:
    """Return an example as a text trace that `kvmtrace check` reads."""
    now_us = 1_000_000
    lines = []
    for line in _unrolled(example):
        if line.startswith("+"):
            now_us += int(line[1:].removesuffix("s")) * 1_000_000
            continue
        found = _EVENT.fullmatch(line)
        if found is None:
            raise ValueError(f"no event: {line}")
        now_us += 1
        flags = "d..1." if found["event"] in _IRQS_OFF else "....."
        task = f" vmm-{found['tid'] or 100}  [{int(found['cpu'] or 0):03d}] {flags}"
        lines.append(f"{task} {now_us // 1_000_000}.{now_us % 1_000_000:06d}: {found['event']}: {found['fields']}")
    return "\n".join(lines) + "\n"


def _unrolled(example: str) -> Iterator[str]:
    """Yield the lines with repetitions written out."""
    rows = [row for row in example.splitlines() if row.strip()]
    while rows:
        row = rows.pop(0)
        if not row.endswith(" times:"):
            yield row.strip()
            continue
        block = []
        while rows and rows[0].startswith("  "):
            block.append(rows.pop(0).strip())
        yield from block * int(row.split()[0])
