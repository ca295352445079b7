"""Bounded decompression of the parts of a trace file.

A compressed part says how large it becomes. That number is only a claim: it is held against the most that
the algorithm can make of the bytes at hand, and nothing larger is ever allocated.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# a real trace shrinks 3 to 40 times; a page of one event repeated at most some 200 times
MAX_RATIO = 1100  # deflate's own limit is 1032
MIN_LIMIT = 1 << 20
MAX_PART = 64 << 20  # one section: formats are some MB, symbols and names some 10
MAX_CHUNK = 16 << 20  # trace-cmd makes chunks of some 10 pages, and pages have 1 MB at most
MAX_KEPT = 64 << 20  # of all sections of a file together, which stay in memory, beside what USUAL_RATIO allows
USUAL_RATIO = 40


def _unzlib(data: memoryview, size: int) -> bytes:
    stream = zlib.decompressobj()
    return stream.decompress(data, size)


def _unzstd(data: memoryview, size: int) -> bytes:
    import zstandard

    # trace-cmd leaves the content size out of its frames, so the frame is read as a stream
    stream = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data, read_across_frames=False)
    return stream.read(size)


def _unzstd_many(data: memoryview, places: NDArray[Any], sizes: NDArray[Any]) -> list[Any]:
    import zstandard

    frames = zstandard.BufferWithSegments(data, places.astype("<u8").tobytes())
    unzstd = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    found: Any = unzstd.multi_decompress_to_buffer(frames, decompressed_sizes=sizes.astype("<u8").tobytes())
    return [found[i] for i in range(len(found))]


ALGORITHMS: dict[str, Callable[[memoryview, int], bytes]] = {"zlib": _unzlib, "zstd": _unzstd}


class Decompressor:
    """Undoes one compression algorithm.

    Parameters
    ----------
    name : str, "zlib" or "zstd"
    path : str, for messages
    """

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self._algorithm = ALGORITHMS[name]
        self._packed = self._chunks = self._kept = 0  # bytes that sections and chunks take, and that they become

    def validate_size(self, compressed: int, size: int, offset: int, most: int = MAX_PART) -> None:
        """Raise FormatError if `compressed` bytes cannot become `size` bytes, or if these are more than `most`."""
        if size > min(max(compressed * MAX_RATIO, MIN_LIMIT), most):
            raise self._incredible(compressed, size, offset)

    def validate_chunk(self, compressed: int, size: int, offset: int) -> None:
        """Take a chunk of pages into account: raise FormatError if it, or all so far, cannot become as large."""
        self.validate_size(compressed, size, offset, MAX_CHUNK)
        self._packed += compressed
        self._chunks += size
        if self._chunks > MAX_KEPT + MAX_RATIO * self._packed:
            raise self._incredible(self._packed, self._chunks, offset)

    def _incredible(self, compressed: int, size: int, offset: int) -> FormatError:
        expected = f"a credible size of {compressed} bytes of {self.name} data"
        return FormatError(self.path, offset, expected, f"{size} bytes claimed")

    def decompress_kept(self, data: memoryview, size: int, offset: int) -> bytes:
        """Return what a part becomes that stays in memory: all of them together are bounded."""
        self._packed += len(data)
        self._kept += size
        if self._kept > MAX_KEPT + USUAL_RATIO * self._packed:
            raise self._incredible(self._packed, self._kept, offset)
        return self.decompress(data, size, offset)

    def decompress_many(self, data: memoryview, places: NDArray[Any], sizes: NDArray[Any]) -> list[Any] | None:
        """Decompress many parts in one call.

        Parameters
        ----------
        places : integers, shape (n, 2), offset in `data` and length of each
        sizes : integers, shape (n,), what each becomes: validated, and above 0

        Returns
        -------
        n buffers; None where one of them is not as it should be, or the algorithm has no such call: they are
        then decompressed one by one, which says what is wrong
        """
        if self.name != "zstd" or not len(places):
            return None
        try:
            found = _unzstd_many(data, places, sizes)
        except Exception:  # noqa: BLE001 - ZstdError, ValueError, MemoryError
            return None
        return found if [len(part) for part in found] == sizes.tolist() else None

    def decompress(self, data: memoryview, size: int, offset: int) -> bytes:
        """Return the `size` bytes that `data` (at file offset `offset`) holds, or its first `size` ones."""
        self.validate_size(len(data), size, offset)
        try:
            result = self._algorithm(data, size)
        except Exception as error:  # zlib.error, ZstdError: each library has its own
            raise FormatError(self.path, offset, f"{self.name} data", str(error)) from error
        if len(result) != size:
            raise FormatError(self.path, offset, f"{size} bytes of {self.name} data", f"{len(result)} bytes")
        return result
