"""Who called sudo: whom recorded commands run as, and who gets the files."""

from __future__ import annotations

import os

from kvmtrace.errors import UsageError

UNCHANGED = 0xFFFFFFFF  # (uid_t) -1: setresuid(2) and chown(2) take it for "leave as it is"


def invoking_user() -> tuple[int, int] | None:
    """Return (uid, gid) of the user who called sudo; None unless root works for somebody else.

    Raises
    ------
    UsageError
        sudo's variables are no user and group ids.
    """
    uid, gid = os.environ.get("SUDO_UID"), os.environ.get("SUDO_GID")
    if os.geteuid() != 0 or uid is None or gid is None:
        return None
    if not (_is_id(uid) and _is_id(gid)):
        raise UsageError(f"SUDO_UID={uid!r} SUDO_GID={gid!r}: not a user's and a group's id")
    return (int(uid), int(gid)) if int(uid) else None


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < UNCHANGED
