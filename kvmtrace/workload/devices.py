"""The devices of every bundled guest: an exit port or address, and ports and MMIO that answer a fixed byte stream.

Deterministic, so that the value of every read can be predicted.
"""

from __future__ import annotations

EXIT_PORT = 0xF4  # OUT of a status byte ends this vCPU's run; 0 is success
EXIT_ADDRESS = 0xF000  # so does a store there, on a machine without ports


class Devices:
    """What one vCPU's PIO and MMIO reads return: the bytes 1, 2, ..., 255, 0, 1, ... in the order of reading.

    Every vCPU has its own, so that threads do not race for the stream.
    """

    def __init__(self) -> None:
        self.n_read = 0
        self.status: int | None = None

    def read(self, length: int) -> bytes:
        """Return the next `length` bytes of the stream."""
        start = self.n_read + 1
        self.n_read += length
        return bytes(value & 0xFF for value in range(start, start + length))

    def write_port(self, port: int, data: bytes) -> None:
        """Take an OUT; the exit port's byte is the guest's status."""
        if port == EXIT_PORT:
            self.status = data[0]

    def write_mmio(self, gpa: int, data: bytes) -> None:
        """Take a store; the exit address's first byte is the guest's status."""
        if gpa == EXIT_ADDRESS:
            self.status = data[0]

    @property
    def ended(self) -> bool:
        """Whether the guest wrote to the exit port or address."""
        return self.status is not None
