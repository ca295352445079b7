"""One MMIO emulation followed event by event: accesses, userspace exits, completion, entry.

A read is traced as unsatisfied, leaves once per piece of at most 8 bytes, and is traced again when it is
complete. Arm's KVM traces a read as unsatisfied before it asks its own devices. A write is traced first and leaves
once per piece that no device in the kernel takes. An access that crosses a page has two parts: an unsatisfied read is
traced with the length of its last part (from 7.0 on once per part, with its own length), a write once per part.
Source: emulator_read_write, read_prepare, write_mmio, complete_emulated_mmio (x86.c); io_mem_abort (arm64's mmio.c)
"""

from __future__ import annotations

from dataclasses import field

from kvmtrace.kvm.userspace_exits import KVM_EXIT_MMIO
from kvmtrace.lazy_dataclass import dataclass

MMIO_UNSATISFIED, MMIO_READ, MMIO_WRITE = 0, 1, 2  # KVM_TRACE_MMIO_*, include/trace/events/kvm.h
_PIECE = 8
_PAGE = 4096


def pieces(length: int) -> int:
    """Return how many userspace exits an access of `length` bytes within a page takes."""
    return -(-length // _PIECE)


def fragments(rest: int, last_part: int, first_gpa: int) -> tuple[tuple[int, ...], int]:
    """Return how many userspace exits a read may take, and the length of its first fragment; none if it cannot be.

    Each page is translated on its own: the two parts of an access may lie in frames far apart, and a part that is RAM,
    or that the kernel serves, makes no fragment.

    Parameters
    ----------
    rest : bytes of the access beside its last fragment
    last_part : bytes of the last fragment, with which the unsatisfied read is traced
    first_gpa : gpa of the first fragment, with which it is traced, too

    Source: emulator_read_write, emulator_read_write_onepage (x86.c)
    """
    if rest == 0:
        return (pieces(last_part),), last_part
    if rest > 0 and (first_gpa + rest) % _PAGE == 0:  # the first page is userspace's, the second may be
        return (pieces(rest), pieces(rest) + pieces(last_part)), rest
    if rest > 0 and (first_gpa + last_part) % _PAGE == 0:  # from 7.0 on: the first page is userspace's alone
        return (pieces(last_part),), last_part
    if rest > 0 and first_gpa % _PAGE == 0:  # only the second page is
        return (pieces(last_part),), last_part
    return (), last_part


@dataclass
class MmioChain:
    """State of one chain; `wrong` collects (position, expected, observed).

    Parameters
    ----------
    known : bool, the chain begins with a VM-exit, so that nothing was pending
    announced : bool, a read is traced as unsatisfied also where a device in the kernel answers it
    """

    known: bool
    announced: bool = False
    checked: int = 0
    wrong: list[tuple[int, str, str]] = field(default_factory=list)
    read: tuple[int, int] | None = None  # (length of the last part, gpa) of the pending read
    second: int = 0  # length of its second part, where that was traced of its own
    exits: int = 0  # userspace exits of the pending read
    write_left: int = 0  # pieces of the last write that have not left yet
    write_end: int = -1  # gpa behind the last write
    wrote: bool = False

    def access(self, position: int, kind: int, length: int, gpa: int) -> None:
        """Take a kvm_mmio."""
        if kind == MMIO_READ:
            self._complete(position, length, gpa)
        elif self._is_second_part(kind, gpa):
            self.second = length
            return
        elif self.read is not None:
            self._note(position, "kvm_mmio read: the pending read is completed first", "another access")
            self.read = None
        if kind == MMIO_UNSATISFIED and not self.known and gpa % _PAGE == 0:
            self.read = None  # perhaps the second part of a read whose first was not seen
        elif kind == MMIO_UNSATISFIED:
            self.read, self.second, self.exits, self.known = (length, gpa), 0, 0, True
            self.write_left, self.wrote = 0, False
        elif kind == MMIO_WRITE:
            # the second part of a write that crosses a page, wherever its frame lies
            continued = self.write_end % _PAGE == 0 == gpa % _PAGE and not self.wrote
            self.write_left = pieces(length) + (self.write_left if continued else 0)
            self.write_end, self.wrote = gpa + length, False

    def _is_second_part(self, kind: int, gpa: int) -> bool:
        """Say whether an access is the second part of the pending read, on a page of its own."""
        if self.read is None or kind != MMIO_UNSATISFIED or self.exits or self.second:
            return False
        length, first_gpa = self.read
        return (first_gpa + length) % _PAGE == 0 == gpa % _PAGE

    def _complete(self, position: int, length: int, gpa: int) -> None:
        if self.read is None:  # a device in the kernel answered, or the chain's begin is not known
            if self.announced and self.known:
                self._note(position, "no kvm_mmio read: none was traced as unsatisfied", "one that is complete")
            return
        last_part, first_gpa = self.read
        self.checked += 1
        self.read = None
        if self.second:
            needed: tuple[int, ...] = (pieces(last_part) + pieces(self.second),)
            needed, fragment = needed if length == last_part + self.second else (), last_part
        else:
            needed, fragment = fragments(length - last_part, last_part, first_gpa)
        pending_gpa = first_gpa + _PIECE * (pieces(fragment) - 1)
        if not needed:
            self._note(position, f"kvm_mmio read of {last_part} bytes, as none crosses a page", f"{length}")
        elif self.exits not in needed and not (self.announced and not self.exits):
            number = " or ".join(str(one) for one in needed)
            self._note(position, f"{number} exits KVM_EXIT_MMIO for a read of {length} bytes", f"{self.exits}")
        elif gpa != pending_gpa:
            self._note(position, f"kvm_mmio read of gpa {pending_gpa:#x}, which was pending", f"gpa {gpa:#x}")

    def leave(self, position: int, reason: int, errno: int) -> None:
        """Take a kvm_userspace_exit."""
        if errno < 0:
            return
        if reason != KVM_EXIT_MMIO:
            self.read, self.write_left = None, 0
            return
        self.checked += 1
        if self.read is not None:
            self.exits += 1
        elif self.write_left > 0:
            self.write_left -= 1
            self.wrote = True
        elif self.known:
            self._note(position, "a kvm_mmio that was not answered in the kernel", "KVM_EXIT_MMIO without one")
        else:
            self.known = False

    def enter(self, position: int) -> None:
        """Take the VM-entry that ends the chain."""
        self.checked += 1
        if self.read is not None:
            self._note(position, "kvm_mmio read: the pending read is completed before the guest goes on", "VM-entry")
        elif self.wrote and self.write_left > 0:
            self._note(position, f"{self.write_left} more KVM_EXIT_MMIO for the rest of the write", "VM-entry")

    def _note(self, position: int, expected: str, observed: str) -> None:
        self.wrong.append((position, expected, observed))
