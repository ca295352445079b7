/*
 * vmx_vcpu_run and svm_vcpu_run: the world switch as KVM brackets it. Its inner part (vmx_vcpu_enter_exit and the
 * assembly) is noinstr and cannot be probed. The loader adds
 *	VCPU_RUN(1, vmx_vcpu_run, 62, 8, VALUE(0, REGS_ARG1(ctx)))
 */
