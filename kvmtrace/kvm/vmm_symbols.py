"""Functions of a VMM worth a uprobe while it builds its VM: role -> the symbols it has had, newest first.

The recorder takes the first symbol that the binary's dynamic symbol table has; the event is named after the
role, so that recordings of different QEMU versions look the same. Arguments are given in the syntax of the
kernel's uprobe_events, for the System V calling convention.
QEMU 10.0 (Debian 13) has no symbol for x86_cpu_new: there the role vmm_cpu_new is not recorded.
Sources: QEMU 7.2 (accel/accel-softmmu.c, softmmu/vl.c, hw/i386/x86.c, softmmu/cpus.c, accel/kvm/kvm-all.c,
qom/object.c); older names from 2.x to 6.x (accel/accel.c, vl.c, cpus.c).
"""

from __future__ import annotations

from kvmtrace.lazy_dataclass import dataclass


@dataclass(frozen=True)
class VmmFunction:
    """A step of a VMM's own start.

    Parameters
    ----------
    role : name of the probe event, always "vmm_..."
    symbols : candidate symbols, newest first
    fields : arguments to record
    is_return : probe the return instead of the entry
    sentence : what the step does
    """

    role: str
    symbols: tuple[str, ...]
    sentence: str
    fields: tuple[str, ...] = ()
    is_return: bool = False


# fmt: off
VMM_FUNCTIONS: tuple[VmmFunction, ...] = (
    VmmFunction("vmm_type_register", ("type_register_static",), "a TypeInfo becomes a TypeImpl in the table of types",
                ("qom_type=+0(+0(%di)):string", "parent=+0(+8(%di)):string")),
    VmmFunction("vmm_init", ("qemu_init", "main"), "the VMM parses its command line and creates the machine object"),
    VmmFunction("vmm_accel_find", ("accel_find",), "a name of the accelerator list is mapped to its class",
                ("accel=+0(%di):string",)),
    VmmFunction("vmm_accel_init_machine", ("accel_init_machine",),
                "AccelState is made and its class's init_machine (kvm_init) is called"),
    VmmFunction("vmm_accel_init_machine_return", ("accel_init_machine",), "0: the accelerator is ready; else the next "
                "name of the list is tried", ("ret=$retval:s32",), is_return=True),
    VmmFunction("vmm_accel_interfaces", ("accel_init_interfaces", "accel_init_ops_interfaces"),
                "how vCPU threads are created and kicked is set for this accelerator"),
    VmmFunction("vmm_board_init", ("machine_run_board_init",), "the board creates its CPUs, memory and devices"),
    VmmFunction("vmm_cpus_init", ("x86_cpus_init", "pc_cpus_init"), "the board creates its CPUs"),
    VmmFunction("vmm_cpu_new", ("x86_cpu_new", "pc_new_cpu"), "a CPU object is created and realized",
                ("apic_id=%si:s64",)),
    VmmFunction("vmm_memory_init", ("pc_memory_init",), "guest memory is laid out; RAM slots follow"),
    VmmFunction("vmm_init_vcpu", ("qemu_init_vcpu",), "the accelerator starts the vCPU's thread"),
    VmmFunction("vmm_thread_create", ("qemu_thread_create",), "a thread is created", ("thread=+0(%si):string",)),
    VmmFunction("vmm_kvm_init_vcpu", ("kvm_init_vcpu",), "on the vCPU's thread: KVM_CREATE_VCPU, mmap of kvm_run"),
    VmmFunction("vmm_kvm_arch_init_vcpu", ("kvm_arch_init_vcpu",), "CPUID, MSRs and features of the vCPU are set"),
    VmmFunction("vmm_accel_setup_post", ("accel_setup_post",), "the machine is complete; the accelerator's last word"),
)
# fmt: on
