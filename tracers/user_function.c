/*
 * Functions of the VMM, as uprobes: their arguments or result join the kernel's events in one stream. The loader
 * finds them by the binary's symbol table (kvmtrace/capture/bpf/uprobes.py) and adds
 *	FUNCTION(1, qemu_kvm_cpu_exec, 70, 8, VALUE(0, REGS_ARG1(ctx)))
 */
