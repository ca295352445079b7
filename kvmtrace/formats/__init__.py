"""Formats of recordings, a folder each; registry.py lists them."""

from kvmtrace.formats.known_formats import open_recording

__all__ = ["open_recording"]
