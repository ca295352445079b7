"""Formats of recordings, a folder each; registry.py lists them."""

from kvmtrace.formats.registry import open_recording

__all__ = ["open_recording"]
