/*
 * Entry and return of kernel (or, as uprobes, user) functions. One body, two ways to be called: as a kprobe, kretprobe
 * or uprobe it is shown the registers, as fentry/fexit the arguments. The loader defines REGS_ARG1(ctx) to
 * REGS_ARG4(ctx) and REGS_RESULT(ctx), by this machine's struct pt_regs.
 */
#define ARRAY_ARG(ctx, n) (*(volatile u64 *)(ctx + 8 * (n)))

/* What stands at a kernel address; 0 where nothing can be read. */
static __always_inline u64 read_u64(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

#define VALUE(slot, value) r->data[slot] = (value);

#define FUNCTION(own, name, kind, size, values) RECORD_IF(is_target(), own, name, kind, size, values)
#define VCPU_RUN(own, name, kind, size, values) RECORD_IF(is_target() && in_kept_exit(), own, name, kind, size, values)
