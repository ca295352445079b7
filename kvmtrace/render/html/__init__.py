"""The HTML report: one self-contained file that opens offline."""

from __future__ import annotations

from kvmtrace.render.html.page import render_html

__all__ = ["render_html"]
