"""The file of `kvmtrace record --summary`: told from others here, read in summary_file.py."""

MAGIC = b'{"schema":"kvmtrace.summary/1"'


def is_summary(head: bytes) -> bool:
    """Say whether a file that begins so is a summary."""
    return head.startswith(MAGIC)
