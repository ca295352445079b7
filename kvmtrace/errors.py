"""Errors that a user can cause, each with its documented exit code.

Everything raised on purpose derives from KvmtraceError; the command line turns it into one line and its
exit code. Any other exception is a bug of ours, and ends with a code of its own: 1 is for verdicts alone.
"""

from __future__ import annotations

import errno

UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h
# what a process or the machine has run out of, and what to do
RESOURCES = {
    errno.EMFILE: "this process may open no more files: raise the limit, `ulimit -n 1024`",
    errno.ENFILE: "the machine's table of open files is full: end other programs, or raise fs.file-max",
    errno.ENOMEM: "free some memory",
    errno.EAGAIN: "no more processes can be started: `ulimit -u`, or a container's limit",
}


class KvmtraceError(Exception):
    """Base class; `exit_code` is what the process ends with."""

    exit_code = UNFORESEEN


class UsageError(KvmtraceError):
    """The request itself makes no sense."""

    exit_code = 2


class FormatError(KvmtraceError):
    """The input is not a trace, or is damaged beyond what can be read.

    Parameters
    ----------
    path : str, the file as the user named it
    offset : int or None, byte offset of the damage
    expected, found : str, in words or a bounded hexdump
    """

    exit_code = 3

    def __init__(self, path: str, offset: int | None, expected: str, found: str) -> None:
        self.path = path
        self.offset = offset
        self.expected = expected
        self.found = found
        where = f"{path}" if offset is None else f"{path}: offset {offset:#x}"
        super().__init__(f"{where}: expected {expected}, found {found}")


class MissingEventError(KvmtraceError):
    """An analysis needs an event or field that the recording does not hold."""

    exit_code = 3


class CapabilityError(KvmtraceError):
    """The environment lacks something; `remedy` says how to get it."""

    exit_code = 4

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


class LostEventsError(KvmtraceError):
    """Events were lost, or nothing of KVM was recorded, and the user asked for --strict."""

    exit_code = 5


# packages of object stores whose errors are no OSErrors: no credentials, no connection, no such bucket
STORE_PACKAGES = frozenset({"botocore", "aiobotocore", "s3fs", "aiohttp", "gcsfs", "google", "adlfs", "azure"})


def is_of_object_store(error: BaseException) -> bool:
    """Say whether an object store, or the way to it, is at fault."""
    return any(kind.__module__.partition(".")[0] in STORE_PACKAGES for kind in type(error).__mro__)
