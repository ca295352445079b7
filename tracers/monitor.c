/*
 * No events: each vCPU thread's automaton is stepped where KVM traces, transitions are counted, and what the model forbids
 * is told with the steps before it (kvmtrace record --monitor).
 *
 * A thread's entry is only touched by the thread itself, the counts only by programs on their CPU: nothing is atomic. All
 * programs hang on raw tracepoints, which are never skipped but within themselves; they do nothing until all are attached
 * (MAP_SWITCH), so that no thread is accused of a step whose predecessor had no program yet.
 *
 * The loader defines MAP_TRAILS (a hash, tid -> struct trail), MAP_FRESH (an array: one trail of zeros), MAP_TABLE (an
 * array: one table), MAP_COUNTS (an array: an element per CPU, a count per place in the table), MAP_BROKEN (a queue of
 * trails), MAP_SWITCH (an array: one word), and adds a line per tracepoint:
 *	MONITOR(kvm_entry, 11)
 *	MONITOR(kvm_fpu, ARGUMENT(u32, 0) ? 5 : 6)
 */
#define ARGUMENT(type, slot) ((type)*(volatile u64 *)(ctx + 8 * (slot)))

struct counts {
	u64 of[N_STATES * N_STEPS];
};

static __always_inline struct trail *this_trail(void)
{
	u64 id = bpf_get_current_pid_tgid();
	u32 tid = id, zero = 0;
	struct trail *t = lookup(MAP_TRAILS, &tid), *fresh;

	if (t || !is_target())
		return t;
	fresh = lookup(MAP_FRESH, &zero);
	if (!fresh)
		return 0;
	update(MAP_TRAILS, &tid, fresh);
	t = lookup(MAP_TRAILS, &tid);
	if (t) {
		t->tid = tid;
		t->pid = id >> 32;
	}
	return t;
}

static __always_inline int take_step(u32 step)
{
	u32 zero = 0, cpu = bpf_get_smp_processor_id(), place;
	u32 *on = lookup(MAP_SWITCH, &zero);
	unsigned char *table = lookup(MAP_TABLE, &zero);
	struct counts *counts = lookup(MAP_COUNTS, &cpu);
	struct trail *t;

	if (!on || !*on || !table || !counts)
		return 0;
	t = this_trail();
	if (!t)
		return 0;
	place = monitor_step(t, table, step, bpf_ktime_get_ns());
	counts->of[place & (N_STATES * N_STEPS - 1)]++;
	if (place >> 16)
		bpf_map_push_elem((void *)bpf_pseudo_fd(1, MAP_BROKEN), t, 0);
	return 0;
}

#define MONITOR(name, step) int on_##name(void *ctx) { return take_step(step); }

/* The thread is gone: so is what was known of it. */
int forget_thread(void *ctx)
{
	u32 tid = *(volatile u32 *)(ctx + FREED_PID_OFFSET);

	bpf_map_delete_elem_(bpf_pseudo_fd(1, MAP_TRAILS), &tid);
	return 1;
}
