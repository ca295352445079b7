"""The spool: a private directory beside the output, where raw pages wait to become the file.

    .NAME.kvmtrace-PID-TOKEN/      0700, on the output's file system; locked (flock) while in use
        manifest.json              what it takes to finish a dead recorder's work, see manifest.py
        head                       the trace.dat header as far as it is known at the start
        cpuN.SEQ                   raw ring-buffer pages of CPU N, in order
        reserve                    room for the end on a full disk
        out                        the file being assembled, renamed to NAME when it is complete

Every name is opened relative to the directory's descriptor, so that nobody who owns the parent directory
can make us follow a link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.invoking_user import invoking_user
from kvmtrace.capture.manifest import read_manifest
from kvmtrace.capture.recorders import Registration
from kvmtrace.errors import RESOURCES, CapabilityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
SEGMENT_BYTES = 32 << 20
RESERVE_BYTES = 4 << 20
SMALLEST_RESERVE_BYTES = 512 << 10
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Say whether the error means that no more can be written there."""
    return error.errno in FULL


class Spool:
    """An open spool directory.

    Attributes
    ----------
    output : Path, what the user named
    path : Path of the directory
    fd, parent_fd : int, descriptors of the directory and of the one that holds it
    manifest : dict, see manifest.py
    owner : (uid, gid) who gets the file, or None
    """

    def __init__(self, output: Path, path: Path) -> None:
        self.output = output
        self.path = path
        self.parent_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.fd = -1
        self.manifest: dict[str, Any] = {}
        self.owner: tuple[int, int] | None = None
        self._spare = -1  # a listing takes a descriptor, also where the process has no more
        self._registration: Registration | None = None

    @classmethod
    def create(cls, output: Path, token: str | None = None) -> Spool:
        """Make a new, locked and registered spool for `output`; the file will belong to who called sudo.

        Raises
        ------
        UsageError
            The output cannot be a file, its directory does not exist, or sudo's variables are no user's.
        CapabilityError
            The directory is read-only, full or not ours to write.
        """
        check_output(output)
        owner = invoking_user()
        token = token or secrets.token_hex(4)
        name = f".{output.name}.kvmtrace-{os.getpid()}-{token}"
        spool = cls(output, output.parent / name)
        spool.owner = owner
        entry = {"output": str(output.absolute()), "spool": str(spool.path.absolute())}
        try:
            spool._registration = Registration.create(token, entry)
            os.mkdir(name, 0o700, dir_fd=spool.parent_fd)
            spool._open()
            spool.save({"created_ns": time.time_ns(), "owner": owner})
            spool._reserve()
        except OSError as error:
            spool.discard()
            place = "free some space" if is_full(error) else "choose another place with -o FILE"
            remedy = RESOURCES.get(error.errno or 0, place)
            raise CapabilityError(f"{output.parent}: {error.strerror}", remedy) from error
        return spool

    @classmethod
    def adopt(cls, output: Path, path: Path) -> Spool | None:
        """Open the spool of a dead recorder; None if there is none, it is in use, or not to be trusted.

        Raises
        ------
        DamagedSpoolError
            It is ours, and its manifest is not what a recorder writes; `set_aside` gets it out of the way.
        """
        try:
            spool = cls(output, path)
        except OSError:
            return None
        try:
            spool._open()
        except OSError:
            spool.close()
            return None
        try:
            with contextlib.suppress(FileNotFoundError):  # killed before it wrote one
                spool.manifest = read_manifest(spool.read_file("manifest.json"))
        except BaseException:
            spool.close()
            raise
        owner = spool.manifest.get("owner")
        spool.owner = (owner[0], owner[1]) if owner else None
        return spool

    def _open(self) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(self.path.name, flags, dir_fd=self.parent_fd)
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "the spool directory is not ours", str(self.path))
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _reserve(self) -> None:
        """Set some room aside, so that a file can be made of what is there when the disk is full."""
        free = os.fstatvfs(self.fd).f_bavail * os.fstatvfs(self.fd).f_frsize
        wanted = max(SMALLEST_RESERVE_BYTES, min(RESERVE_BYTES, free // 4))
        fd = self.open_new("reserve")
        try:
            os.posix_fallocate(fd, 0, wanted)
        finally:
            os.close(fd)

    def release_reserve(self) -> bool:
        """Give the reserved room back; False if that was done before."""
        try:
            os.unlink("reserve", dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True

    def save(self, values: dict[str, Any]) -> None:
        """Add values to the manifest; whenever the process dies, the old or the new one is there, whole."""
        self.manifest |= values
        text = json.dumps(self.manifest).encode()
        try:
            self.replace_file("manifest.json", text)
        except OSError as error:
            if not is_full(error) or not self.release_reserve():
                raise
            self.replace_file("manifest.json", text)

    def open_new(self, name: str) -> int:
        """Create a file of the spool and return its descriptor."""
        return os.open(name, NEW_FILE, 0o600, dir_fd=self.fd)

    def open_old(self, name: str, flags: int = os.O_RDWR) -> int:
        """Open a file of the spool."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)

    def write_file(self, name: str, data: bytes) -> None:
        """Create (or replace) a file of the spool."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)
        with os.fdopen(self.open_new(name), "wb") as file:
            file.write(data)

    def replace_file(self, name: str, data: bytes) -> None:
        """Create or replace a file of the spool; whenever the process dies, the old or the new one is there, whole."""
        self.write_file(f"{name}.new", data)
        os.rename(f"{name}.new", name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def read_file(self, name: str) -> bytes:
        """Return the content of a file of the spool."""
        with os.fdopen(self.open_old(name, os.O_RDONLY), "rb") as file:
            return file.read()

    def pages(self, name: str) -> Iterator[bytes]:
        """Yield the whole pages of a file of the spool."""
        with os.fdopen(self.open_old(name, os.O_RDONLY), "rb") as file:
            while len(page := file.read(PAGE_SIZE)) == PAGE_SIZE:
                yield page

    def segments(self) -> dict[int, list[str]]:
        """Return the segment files of each CPU, in order."""
        found: dict[int, list[tuple[int, str]]] = {}
        for name in os.listdir(self.fd):  # noqa: PTH208 (a descriptor, not a path)
            cpu, dot, number = name.removeprefix("cpu").partition(".")
            if name.startswith("cpu") and dot and cpu.isdigit() and number.isdigit():
                found.setdefault(int(cpu), []).append((int(number), name))
        return {cpu: [name for _, name in sorted(parts)] for cpu, parts in sorted(found.items())}

    def size_of(self, name: str) -> int:
        """Return the size of a file of the spool."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_size

    def unlink(self, name: str) -> None:
        """Remove a file of the spool."""
        os.unlink(name, dir_fd=self.fd)

    def publish(self, name: str, destination: str) -> Path:
        """Give the finished file to its owner and put it, in one step, where the user wanted it; return its path."""
        fd = self.open_old(name)
        try:
            os.fchmod(fd, 0o600)
            if self.owner is not None:
                with contextlib.suppress(PermissionError):  # NFS may not let root do it; the file is worth more
                    os.fchown(fd, *self.owner)
        finally:
            os.close(fd)
        with contextlib.suppress(OSError):  # on a full disk: the file is worth more than what is told of it
            self.save({"publishing": True})
        os.rename(name, destination, src_dir_fd=self.fd, dst_dir_fd=self.parent_fd)
        return self.folder() / destination

    def was_published(self, name: str) -> bool:
        """Say whether a recorder was killed between publishing its file and discarding the spool."""
        return self.manifest.get("publishing", False) and name not in os.listdir(self.fd)  # noqa: PTH208

    def folder(self) -> Path:
        """Return the directory that holds the spool, also if somebody has renamed it since."""
        try:
            before, now = self.path.parent.stat(), os.fstat(self.parent_fd)
        except OSError:
            return Path(f"/proc/self/fd/{self.parent_fd}").readlink()
        if (before.st_dev, before.st_ino) == (now.st_dev, now.st_ino):
            return self.path.parent
        return Path(f"/proc/self/fd/{self.parent_fd}").readlink()

    def where(self) -> Path:
        """Return where the spool is now."""
        return self.folder() / self.path.name

    def gone(self) -> bool:
        """Say whether somebody has deleted the spool, with what was recorded."""
        return self.fd >= 0 and not os.fstat(self.fd).st_nlink

    def why_unpublished(self, error: OSError) -> CapabilityError:
        """Return what to say where `publish`, or what leads to it, failed."""
        if self.gone():
            return CapabilityError(
                f"{self.output.parent}: deleted during the recording, and what was recorded with it",
                "choose another place with -o FILE",
            )
        return CapabilityError(
            f"{self.output}: {error.strerror}; the recording waits in {self.where()}",
            "make room there, then finish it as the same user with: kvmtrace doctor",
        )

    def discard(self) -> None:
        """Remove the directory with all that is in it, and close it."""
        self._close_spare()
        if self.fd >= 0:
            for name in os.listdir(self.fd):  # noqa: PTH208 (a descriptor, not a path)
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self.fd)
        if self.parent_fd >= 0:
            with contextlib.suppress(OSError):
                os.rmdir(self.path.name, dir_fd=self.parent_fd)
        if self._registration is not None:
            self._registration.remove()
        self.close()

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def close(self) -> None:
        """Close the directory and unlock it; what it holds can be finished later."""
        self._close_spare()
        if self._registration is not None:
            self._registration.close()
        for fd in (self.fd, self.parent_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.parent_fd = -1


def set_aside(output: Path, path: Path) -> Path:
    """Rename a spool that cannot be finished, so that no command meets it again; return its new path."""
    place = output.parent / f"{output.name}.unfinished-{path.name.rpartition('-')[2]}"
    path.rename(place)
    return place


def check_output(output: Path) -> None:
    """Refuse an output that is not, or cannot become, a regular file.

    Raises
    ------
    UsageError
        It is a directory, device or pipe, or standard output.
    CapabilityError
        Its directory does not exist.
    """
    if str(output) == "-":
        raise UsageError("a recording is written as a whole file: give its name, not -")
    if not output.parent.is_dir():
        raise CapabilityError(
            f"{output.parent}: no such directory", "make it first, or choose another place with -o FILE"
        )
    if not output.name or output.is_dir():
        raise UsageError(f"{output}: is a directory")
    if output.exists() and not output.is_symlink() and not output.is_file():
        raise UsageError(f"{output}: not a regular file; a recording is written as a whole file")
