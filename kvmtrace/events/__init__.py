"""The event table: what every analysis reads."""

from kvmtrace.events.opening import open_recording

__all__ = ["open_recording"]
