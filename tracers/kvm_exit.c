/*
 * kvm_exit and kvm_entry with the filters that judge a VM-exit: by vCPU, by reason, 1 in N, slower than.
 *
 * A VM-exit is kept or dropped whole: kvm_exit, what KVM does about it, and the kvm_entry that ends it. With
 * FILTER_SLOWER_NS the verdict falls at kvm_entry, so kvm_exit waits in the thread's state and both are written then,
 * with their own time stamps; what happened between is not held. The loader defines, by the format files:
 * EXIT_REASON(ctx), EXIT_VCPU_OFFSET, ENTRY_VCPU_OFFSET, EXIT_WORDS, and FILTER_REASONS(r) as a condition.
 */
#if defined(FILTER_VCPU) || defined(FILTER_REASONS) || defined(FILTER_SAMPLE) || defined(FILTER_SLOWER_NS)
#define EXITS_FILTERED

struct thread {
	u64 exit_ns;        /* of the VM-exit under way, 0: none */
	u64 n_exits;
	u32 dropping;
	u32 other_vcpu;     /* this thread runs a vCPU that is not wanted */
#ifdef FILTER_SLOWER_NS
	struct record held; /* kvm_exit's record, */
	u64 held_data[EXIT_WORDS];
#endif
};

static __always_inline struct thread *this_thread(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	return lookup(MAP_THREADS, &tid);
}

static __always_inline struct thread *make_thread(void)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct thread *t = lookup(MAP_THREADS, &tid);
	struct thread fresh = {};

	if (!t) {
		update(MAP_THREADS, &tid, &fresh);
		t = lookup(MAP_THREADS, &tid);
	}
	return t;
}

static __always_inline int in_kept_exit(void)
{
	struct thread *t = this_thread();

	if (t && (t->dropping || t->other_vcpu)) {
		count_filtered();
		return 0;
	}
	return 1;
}

static __always_inline int is_wanted_exit(void *ctx, struct thread *t)
{
	u32 reason = EXIT_REASON(ctx);

#ifdef FILTER_VCPU
	t->other_vcpu = *(volatile u32 *)(ctx + EXIT_VCPU_OFFSET) != FILTER_VCPU;
	if (t->other_vcpu)
		return 0;
#endif
#ifdef FILTER_REASONS
	if (!(FILTER_REASONS(reason)))
		return 0;
#endif
#ifdef FILTER_SAMPLE
	if (t->n_exits++ % FILTER_SAMPLE)
		return 0;
#endif
	return 1;
}

static __always_inline int keeps_exit(void *ctx)
{
	struct thread *t = make_thread();

	if (!t)
		return 1;
	t->dropping = !is_wanted_exit(ctx, t);
	if (t->dropping) {
		t->exit_ns = 0;
		count_filtered();
	}
	return !t->dropping;
}

static __always_inline int keeps_entry(void *ctx)
{
	struct thread *t = make_thread();
	u32 dropped;

	if (!t)
		return 1;
#ifdef FILTER_VCPU
	t->other_vcpu = *(volatile u32 *)(ctx + ENTRY_VCPU_OFFSET) != FILTER_VCPU;
#endif
	dropped = t->dropping || t->other_vcpu;  /* until the next kvm_exit: probes may follow in the guest's time */
	if (dropped)
		count_filtered();
	return !dropped;
}
#else
#define in_kept_exit() 1
#define keeps_exit(ctx) 1
#define keeps_entry(ctx) 1
#endif

#ifndef FILTER_SLOWER_NS
#define KVM_EXIT(name, kind, size, copies) RECORD_IF(is_target() && keeps_exit(ctx), 1, name, kind, size, copies)
#define KVM_ENTRY(name, kind, size, copies) RECORD_IF(is_target() && keeps_entry(ctx), 1, name, kind, size, copies)
#else
/* Hold kvm_exit; everything of this thread is dropped until kvm_entry has judged. */
#define KVM_EXIT(name, number, size, copies) \
	static __always_inline int hold_##name(void *ctx) \
	{ \
		struct cpu_state *state = this_cpu(); \
		struct thread *t; \
		struct record *r; \
		if (!is_target() || !keeps_exit(ctx)) \
			return 1; \
		t = this_thread(); \
		if (!t || !state) \
			return 1; \
		r = &t->held; \
		copies \
		r->kind = number; \
		set_context(r, state, 1); \
		t->exit_ns = bpf_ktime_get_ns(); \
		t->dropping = 1; \
		return 1; \
	} \
	int on_##name(void *ctx) { return hold_##name(ctx); }

static __always_inline int judge_exit(void)
{
	struct thread *t = make_thread();
	struct record *r;
	u64 flags;
	int i;

	if (!t)
		return 0;
	if (!t->exit_ns || bpf_ktime_get_ns() - t->exit_ns < FILTER_SLOWER_NS) {
		if (t->exit_ns)
			count_filtered();
		t->exit_ns = 0;
		t->dropping = 1;
		return 0;
	}
	r = reserve(t->held.kind, 8 * EXIT_WORDS, 1, &flags);
	if (r) {
		r->ts_ns = t->exit_ns;
		r->irq_flags = t->held.irq_flags;
		r->preempt_count = t->held.preempt_count;
#pragma unroll
		for (i = 0; i < EXIT_WORDS; i++)
			r->data[i] = t->held_data[i];
		bpf_ringbuf_submit(r, flags);
	}
	t->exit_ns = 0;
	t->dropping = 1;
	return 1;
}

#define KVM_ENTRY(name, kind, size, copies) RECORD_IF(is_target() && judge_exit(), 1, name, kind, size, copies)
#endif
