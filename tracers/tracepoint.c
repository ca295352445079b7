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

/*
 * The same event from a raw tracepoint's arguments, for those whose record is a plain copy of them: the kernel need not
 * fill in a record first. The loader adds, where the kernel's type information tells which argument is which field,
 *	TRACEPOINT(kvm_fpu_raw, 9, 4, SET4(8, 0))
 * (... offset in the record, argument). CLEAR8 is for words that the fields do not fill.
 */
#define SET(type, offset, slot) *(type *)((u8 *)r->data + (offset) - 8) = *(volatile u64 *)(ctx + 8 * (slot));
#define SET8(offset, slot) SET(u64, offset, slot)
#define SET4(offset, slot) SET(u32, offset, slot)
#define SET2(offset, slot) SET(u16, offset, slot)
#define SET1(offset, slot) SET(u8, offset, slot)
#define CLEAR8(offset) *(u64 *)((u8 *)r->data + (offset) - 8) = 0;
#define CLEAR4(offset) *(u32 *)((u8 *)r->data + (offset) - 8) = 0;
#define CLEAR2(offset) *(u16 *)((u8 *)r->data + (offset) - 8) = 0;
#define CLEAR1(offset) *(u8 *)((u8 *)r->data + (offset) - 8) = 0;

/* Not a follow-up of a VM-exit: the exit filters do not apply (syscalls, threads that come and go). */
#define TRACEPOINT_ALWAYS(name, kind, size, copies) RECORD_IF(is_target(), 1, name, kind, size, copies)
