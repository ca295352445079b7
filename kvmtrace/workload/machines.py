"""Which guests and which VMM belong to an architecture: one row each."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.workload.arm64_guests import ARM64_GUESTS
from kvmtrace.workload.guest_file import is_guest_file, read_guest
from kvmtrace.workload.guests import GUESTS
from kvmtrace.workload.host_isa import guess_isa

if TYPE_CHECKING:
    from kvmtrace.workload.guests import Guest
    from kvmtrace.workload.vmm import Vcpu, Vm


@dataclass(frozen=True)
class Machine:
    """An architecture's guests; what runs them is imported when it is needed."""

    guests: dict[str, Guest]
    module: str
    vm: str
    vcpu: str

    def vmm(self) -> tuple[type[Vm], type[Vcpu]]:
        """Return the classes of a VM and a vCPU."""
        import importlib

        found = importlib.import_module(self.module)
        return getattr(found, self.vm), getattr(found, self.vcpu)


_PC = Machine(GUESTS, "kvmtrace.workload.vmm", "Vm", "Vcpu")
_OTHERS = {"arm64": Machine(ARM64_GUESTS, "kvmtrace.workload.arm64_vmm", "Arm64Vm", "Arm64Vcpu")}


def machine_of(isa: str | None) -> Machine:
    """Return the row of an ISA; several share the PC's."""
    return _OTHERS.get(isa or "", _PC)


def find_guest(name: str, isa: str | None = None) -> Guest:
    """Return the guest of that name on an ISA (default: this machine's), or that of a file (FILE.lst).

    Raises
    ------
    UsageError
        There is none; the message names all.
    """
    if is_guest_file(name):
        return read_guest(name)
    guests = machine_of(isa or guess_isa()).guests
    if name not in guests:
        alike = difflib.get_close_matches(name, guests, n=1)
        meant = f"did you mean {alike[0]}? There" if alike else "there"
        raise UsageError(f"there is no guest {name}; {meant} are {', '.join(guests)}")
    return guests[name]
