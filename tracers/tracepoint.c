/*
 * Any tracepoint: copies the record that the kernel filled in, as it is, behind our header.
 *
 * The loader reads the tracepoint's format file and adds one line per event,
 *	TRACEPOINT(kvm_pio, 7, 20, COPY8(8) COPY8(16) COPY4(24))
 * (name, kind, bytes, copies). Offsets therefore come from the running kernel, and the format text goes into the
 * capture, so no field is known by kernel version. The first 8 bytes (common fields) are not readable here: what
 * they say stands in our header.
 */
#define COPY8(offset) *(u64 *)((u8 *)r->data + (offset) - 8) = *(volatile u64 *)(ctx + (offset));
#define COPY4(offset) *(u32 *)((u8 *)r->data + (offset) - 8) = *(volatile u32 *)(ctx + (offset));
#define COPY2(offset) *(u16 *)((u8 *)r->data + (offset) - 8) = *(volatile u16 *)(ctx + (offset));
#define COPY1(offset) *(u8 *)((u8 *)r->data + (offset) - 8) = *(volatile u8 *)(ctx + (offset));

/*
 * What a program returns matters to others: 0 would keep the event from everybody's perf. `own` is 1 for programs that
 * perf's tracepoints and kprobes call, and 0 for fentry/fexit, which must return 0 (see set_context for its other use).
 */
#define RECORD_IF(condition, own, name, kind, size, copies) \
	static __always_inline int record_##name(void *ctx) \
	{ \
		struct record *r; \
		u64 flags; \
		if (!(condition)) \
			return own; \
		r = reserve(kind, size, own, &flags); \
		if (r) { \
			copies \
			bpf_ringbuf_submit(r, flags); \
		} \
		return own; \
	} \
	int on_##name(void *ctx) { return record_##name(ctx); }

#define TRACEPOINT(name, kind, size, copies) \
	RECORD_IF(is_target() && in_kept_exit(), 1, name, kind, size, copies)

/* Not a follow-up of a VM-exit: the exit filters do not apply (syscalls, threads that come and go). */
#define TRACEPOINT_ALWAYS(name, kind, size, copies) RECORD_IF(is_target(), 1, name, kind, size, copies)
