/*
 * kvm_vcpu_ioctl: every ioctl on a vCPU, KVM_RUN (cmd 0xae80) above all, and what it returned. The loader adds, by
 * the table PROBES of kvmtrace/kvm/tracepoints.py,
 *	FUNCTION(1, kvm_vcpu_ioctl, 60, 24, VALUE(0, REGS_ARG1(ctx)) VALUE(1, REGS_ARG2(ctx)) VALUE(2, REGS_ARG3(ctx)))
 */
