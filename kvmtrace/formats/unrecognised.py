"""What a file is that no format reads, in words, and what to do about it; bytes are shown of binary files alone."""

from __future__ import annotations

import re

from kvmtrace.formats.common.cursor import describe_bytes

# fmt: off
_PACKED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"PK\x03\x04": "zip",
           b"\x89LZO": "lzop", b"\x04\x22\x4d\x18": "lz4"}
# what a line looks like -> what it is, and what to do
_LOOKS: tuple[tuple[str, str], ...] = (
    (r"^[ \t>]*\d{1,12}\.\d{3,9}:[ \t]+(?:\w+:)?\w+:[ \t]",
     "lines of events without task and CPU; print them whole: trace-cmd report, or perf script without -F"),
    (r"^[ \t]*\S.{0,40}[ \t](?:\d+/)?\d+[ \t]+\d+\.\d{6,9}:[ \t]+(?:\w+:)?\w+:",
     "output of perf script without the CPU; print it with: perf script -F +cpu"),
    (r"^[ \t>]*\[\d{1,5}\][ \t]+\d+\.\d{3,9}:[ \t]+(?:\w+:)?\w+:",
     "lines of events without task; print them whole: trace-cmd report, or perf script -F +comm,tid"),
    (r"^[ \t>]*\S.{0,40}?[ \t]+\d+\.\d{3,9}:[ \t]+(?:\d+[ \t]+)?\w+:\w+:",
     "output of perf script without thread and CPU; print it with: perf script -F +tid,cpu"),
    (r"^[ \t>]*\d+\.\d{3}[ \t].*\bkvm:\w+\(",
     "output of perf trace, which leaves out fields; use perf record -e 'kvm:*' and its perf.data"),
    (r"^[ \t>]*(?:\S.{0,40}?-\d+|CPU[ \t]*\d+:|\[\d+\])[ \t]+(?:\[\d+\][ \t]+)?(?:[.\w]{3,6}[ \t]+)?kvm_\w+:",
     "events without time stamps; print them whole: trace-cmd report, or the file trace of tracefs"),
    (r"^[ \t>*]*(?:kvm:)?kvm_\w+:[ \t]",
     "events alone, without task, CPU and time; print the lines whole: trace-cmd report, or the file trace of tracefs"),
    (r"^[ \t]*(?:<[\w.]+>|[\w./:-]+)-\d+[ \t].*\n[ \t>]*\S",
     "trace lines that were wrapped; put each event on one line, or attach the file instead of pasting it"),
    (r"Analyze events for|VM-EXIT[ \t]+Samples", "a table of perf kvm stat; record the events themselves"),
    (r"^(?:<\d+>)?\[[ \t]*\d+\.\d{6}\][ \t]", "a kernel log (dmesg), no trace"),
    (r'^\{"schema": ?"kvmtrace\.summary', "a recording of --summary, without events; use kvmtrace report"),
    (r'^\{\s*"schema": ?"kvmtrace\.report', "a report of kvmtrace, no recording"),
    (r"^\s*<(?:!DOCTYPE|html)", "an HTML page; save the trace that it shows as text"),
    (r"^(?:\d+ +)?\w+\(.*\)\s+= ", "output of strace, no trace of KVM"),
)
# fmt: on
_PATTERNS = tuple((re.compile(pattern, re.MULTILINE | re.IGNORECASE), words) for pattern, words in _LOOKS)
_SHOWN = 40  # characters of an unknown text


def describe_unrecognised(head: bytes) -> str:
    """Return what a file that begins with `head` is."""
    if not head:
        return "an empty file"
    packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
    if packed is not None:
        return f"a file compressed by {packed}; unpack it first"
    text = _as_text(head)
    if text is None:
        return describe_bytes(head[:17])
    looks = next((words for pattern, words in _PATTERNS if pattern.search(text)), None)
    if looks is not None:
        return looks
    begin = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"text without a line of a trace, beginning with {begin[:_SHOWN]!r}"


def _as_text(head: bytes) -> str | None:
    """Return the bytes as text; None if they are none: control characters, or no UTF-8."""
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        return None
    try:
        return head[:-3].decode() + head[-3:].decode("utf-8", "ignore")  # the last character may be cut
    except UnicodeDecodeError:
        return None if sum(byte > 127 for byte in head) * 10 > len(head) else head.decode("latin-1")
