"""Probes on functions of user-space binaries (uprobes), into the same stream as the kernel's events.

probe = UserProbe("qemu_kvm_cpu_exec", "/usr/bin/qemu-system-x86_64", "kvm_cpu_exec", ("cpu=$arg1:x64",))
bpf_recorder.record(settings, user_probes=[probe])
"""

from __future__ import annotations

from kvmtrace.capture.bpf.event_programs import TracedEvent, describe_probe
from kvmtrace.lazy_dataclass import dataclass


@dataclass(frozen=True)
class UserProbe:
    """A probe on a user-space function.

    Parameters
    ----------
    name : str, of the event, of the system "kvmtrace"
    binary : str, path of the executable or library
    symbol : str, the function
    fields : "name=$arg1:x64" (arguments 1 to 4) or, for a return, "name=$retval:s64"
    is_return : bool
    """

    name: str
    binary: str
    symbol: str
    fields: tuple[str, ...] = ()
    is_return: bool = False

    def event(self) -> TracedEvent:
        """Return the kind it records."""
        return describe_probe(self.name, (self.symbol, self.is_return, self.fields))
