"""The numbers that decide: how many repetitions are a storm, how long a look ahead is, what counts as certain."""

from __future__ import annotations

from typing import NamedTuple


class Threshold(NamedTuple):
    """A number that a rule or guard compares with, its unit, and what it means."""

    value: int
    unit: str
    sentence: str


# fmt: off
THRESHOLDS: dict[str, Threshold] = {
    "window_storm": Threshold(64, "VM-exits", "interrupt-window exits in a row without an injection are a storm (H2)"),
    "window_storm_at_one_rip": Threshold(4, "VM-exits", "... and so many at one RIP (H2)"),
    "no_progress": Threshold(256, "VM-exits", "equal exits at one instruction in a row make no progress (H3)"),
    "remap_takes": Threshold(100_000_000, "ns", "KVM may retry faults for so long after the VM's memory changed (H3)"),
    "wakes_within": Threshold(1_000_000_000, "ns", "an accepted interrupt wakes a halted vCPU within (H1, H4)"),
    "woken_within": Threshold(50_000_000, "ns", "an interrupt for a sleeping vCPU is injected within, if the CPU is "
                                                "free (H1)"),
    "init_served_within": Threshold(10_000_000, "ns", "an INIT that was accepted so long ago may be served now "
                                                      "(guard init_reset)"),
    "clocks_differ": Threshold(1_000_000, "ns", "the clocks of two CPUs may differ by so much (V5, V11, H8, I5)"),
    "clock_measures": Threshold(100_000, "ns", "a trace clock that goes on by less while a vCPU waits may count events "
                                               "(V5)"),
    "look_ahead": Threshold(4096, "events", "so far a guard looks for the thread's next or last step"),
    "look_back": Threshold(64, "events", "so far a guard looks for the VM-exit before (guard fastpath_exit)"),
    "decoded_skips": Threshold(16, "VM-exits", "so many decoded skips show that this host decodes to skip: no NRIPS "
                                               "(V4)"),
    "decoded_share": Threshold(50, "times", "... if they are so many times more than those that were not decoded"),
    "longest_instruction": Threshold(15, "bytes", "no x86 instruction is longer (V6, H6)"),
    "emulation_prefix": Threshold(5, "bytes", "what a guest puts before an instruction to have it emulated: UD2 and "
                                              "\"kvm\" (V6)"),
    "unexplained_shown": Threshold(1, "percent", "more unexplained ones among the vCPU threads' own events are shown"),
    "partly_judged": Threshold(90, "percent", "a verdict that rests on less of the vCPU threads' own events says so"),
}
# fmt: on


def threshold(name: str) -> int:
    """Return the value of a threshold."""
    return THRESHOLDS[name].value
