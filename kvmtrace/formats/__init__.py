"""The event table: what every analysis reads."""

from kvmtrace.formats.opening import open_recording

__all__ = ["open_recording"]
