"""Writes initramfs archives ("newc" cpio), so that no external tool is needed.

Source: Documentation/driver-api/early-userspace/buffer-format.rst
"""

from __future__ import annotations

import stat


class CpioArchive:
    """An archive that grows in memory; parent directories are added where missing."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._names: set[str] = set()

    def add_file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file; `name` is relative to the archive's root."""
        self._add_parents(name)
        self._add(name, stat.S_IFREG | mode, data)

    def add_symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add_parents(name)
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_directory(self, name: str) -> None:
        """Add a directory unless it is there."""
        if name not in self._names:
            self._add_parents(name)
            self._add(name, stat.S_IFDIR | 0o755, b"")

    def add_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device (the console that init is given)."""
        self._add_parents(name)
        self._add(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def to_bytes(self) -> bytes:
        """Return the archive with its end marker, padded to 512 bytes."""
        data = b"".join([*self._chunks, _entry("TRAILER!!!", 0, b"", 0, (0, 0))])
        return data + b"\0" * (-len(data) % 512)

    def _add_parents(self, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent:
            self.add_directory(parent)

    def _add(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._names.add(name)
        self._chunks.append(_entry(name, mode, data, len(self._names), device))


def _entry(name: str, mode: int, data: bytes, inode: int, device: tuple[int, int]) -> bytes:
    path = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device of the file (2), device it names (2), name size, check
    numbers = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers) + path
    header += b"\0" * (-len(header) % 4)
    return header + data + b"\0" * (-len(data) % 4)
