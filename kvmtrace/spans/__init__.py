"""Intervals between events: VM-exits, userspace, system calls, time parts, and what a loss may hide of them."""
