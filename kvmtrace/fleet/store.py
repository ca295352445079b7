"""Where summaries lie: a folder or a bucket, one immutable object per recording, named by its content.

    DEST/summaries/day=2026-11-27/kernel=6.1.0-56-amd64/cpu_model=.../<sha256>.parquet
    DEST/failures/<sha256 of the source's name>.parquet

Any fsspec URL is a DEST. An object is written whole or not at all: under a temporary name and renamed on a file
system, by one PUT in an object store.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kvmtrace.errors import CapabilityError, FormatError, UsageError
from kvmtrace.fleet.summary_schema import FAILURE, SUMMARY

if TYPE_CHECKING:
    import pyarrow as pa

SUMMARIES, FAILURES = "summaries", "failures"
PARTITIONS = ("day", "kernel", "cpu_model")
NOT_TOLD = "unknown"
_TEMPORARY = ".tmp-"


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return (fsspec file system, path in it) of a folder's URL or path.

    Raises
    ------
    CapabilityError
        fsspec, or its part for this protocol, is not installed.
    UsageError
        No such protocol is known.
    """
    try:
        import fsspec
    except ImportError as error:
        raise CapabilityError("fsspec is not installed", "pip install 'kvmtrace[fleet]'") from error
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise CapabilityError(f"{url}: {error}", "pip install 'kvmtrace[fleet]'") from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}") from error
    return filesystem, str(path).rstrip("/")


class Store:
    """Reads and writes the objects of one DEST.

    Parameters
    ----------
    url : path or fsspec URL of the folder

    Raises
    ------
    UsageError
        There is a file of that name, or none was given.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        if not url.strip():
            raise UsageError("the summaries need a folder or a URL, not an empty name")
        self.filesystem, self.root = filesystem_of(url)
        if self.is_local and self.filesystem.exists(self.root) and not self.filesystem.isdir(self.root):
            raise UsageError(f"{url} is a file: summaries go to a folder")

    @property
    def is_local(self) -> bool:
        """Say whether the folder is on this machine's file system."""
        protocol = self.filesystem.protocol
        return "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def objects(self, folder: str) -> list[str]:
        """Return the paths of a folder's objects, sorted; [] if there is none."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.find(f"{self.root}/{folder}")
        except FileNotFoundError:
            return []
        names = (str(path) for path in found)
        return sorted(path for path in names if path.endswith(".parquet") and _TEMPORARY not in path)

    def checksums(self) -> set[str]:
        """Return the checksums of the recordings that have a summary."""
        return {path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in self.objects(SUMMARIES)}

    def write_summary(self, row: dict[str, Any]) -> str:
        """Write a recording's summary; return its path.

        Raises
        ------
        FormatError
            It holds numbers that no summary can: those of a damaged recording.
        """
        parts = [f"{name}={quote(str(row.get(name) or NOT_TOLD), safe='.+-_')}" for name in PARTITIONS]
        path = "/".join([self.root, SUMMARIES, *parts, f"{row['checksum']}.parquet"])
        try:
            self._write(path, row, SUMMARY)
        except (OverflowError, ValueError) as error:  # of pyarrow; its errors are ValueErrors
            told = " ".join(str(error).split())[:200]
            raise FormatError(str(row["source"]), None, "times and counts of at most 64 bits", told) from error
        return path

    def write_failure(self, source: str, error: str, kind: str, attempts: int) -> None:
        """Note that a source could not be summarised."""
        row = {"source": source, "error": error, "kind": kind, "attempts": attempts}
        self._write(self._failure_path(source), row, FAILURE)

    def forget_failure(self, source: str) -> None:
        """Remove a source's note, now that it was summarised."""
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self._failure_path(source))

    def _failure_path(self, source: str) -> str:
        return f"{self.root}/{FAILURES}/{hashlib.sha256(source.encode()).hexdigest()}.parquet"

    def _write(self, path: str, row: dict[str, Any], schema: pa.Schema) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        table = pa.Table.from_pylist([row], schema=schema)
        # one row: statistics, dictionaries and Arrow's copy of the schema would be larger than the data
        pq.write_table(
            table, buffer, compression="zstd", write_statistics=False, use_dictionary=False, store_schema=False
        )
        if not self.is_local:
            self.filesystem.pipe_file(path, buffer.getvalue())
            return
        self.filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        draft = f"{path.rsplit('/', 1)[0]}/{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            self.filesystem.pipe_file(draft, buffer.getvalue())
            os.replace(draft, path)  # noqa: PTH105 - both are strings of fsspec
        finally:
            with suppress(FileNotFoundError):
                self.filesystem.rm_file(draft)
