"""Functions of KVM that are probed on entry and return: the vCPU's ioctl, and each ISA's run function.

They become events of the system "kvmtrace" (kvm.tracepoints.PROBE_SYSTEM), by kprobe or by BPF program.
"""

from __future__ import annotations

from kvmtrace.isa.registry import ISAS

Probe = tuple[str, bool, tuple[str, ...]]


def _run_function(name: str) -> dict[str, Probe]:
    return {
        name: (name, False, ("vcpu=$arg1:x64",)),
        f"{name}_return": (name, True, ("ret=$retval:s32",)),
    }


# probe event -> (kernel function, is it the return?, fields "name=fetch argument" of the kprobe interface)
PROBES: dict[str, Probe] = {
    "kvm_vcpu_ioctl": ("kvm_vcpu_ioctl", False, ("filp=$arg1:x64", "cmd=$arg2:x32", "arg=$arg3:x64")),
    "kvm_vcpu_ioctl_return": ("kvm_vcpu_ioctl", True, ("ret=$retval:s64",)),
}
# probe event -> further fields, which only the running kernel's types locate (capture.run_fields)
RUN_FIELDS: dict[str, tuple[str, ...]] = {}
for _isa in ISAS:
    if _isa.run_function:
        PROBES |= _run_function(_isa.run_function)
    if _isa.run_flags:
        RUN_FIELDS[_isa.run_function] = (f"rflags={_isa.run_flags}:x64",)
