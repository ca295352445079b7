/*
 * No events: per thread and exit reason a count, a time and a log2 histogram, and how the thread's time was spent.
 * kvmtrace record --summary writes what stands here at the end, kvmtrace top shows it while it grows.
 *
 * A thread's entry is only touched by the thread itself, or by the context switch that takes it off or puts it on a
 * CPU: so nothing here is atomic. Each CPU notes whose entry is in use there, so a VM-exit costs two look-ups in
 * arrays; threads are looked up in a hash when they come onto a CPU.
 *
 * Every program exists twice: raw_NAME hangs on a raw (sched_switch: BTF) tracepoint and is given KVM's arguments,
 * which spares the kernel filling in a record; on_NAME hangs on the plain tracepoint, where the raw one cannot be had.
 * The loader defines MAP_THREADS (an array), MAP_SLOTS (tid -> index), MAP_FREE (a queue of unused indices, empty
 * until all programs are attached), MAP_HERE (per CPU, at first NO_SLOT), MAP_OTHERS, *_OFFSET by the format files, and
 * *_ARG, *_AT by the kernel's type information (kvmtrace/capture/bpf/btf_types.py).
 */
#define NO_SLOT 0xffffffffU  /* beyond the array: its look-up fails */
#define RECORD(type, offset) (*(volatile type *)(ctx + (offset)))
#define ARGUMENT(type, slot) ((type)*(volatile u64 *)(ctx + 8 * (slot)))

static __always_inline u32 find_slot(u32 tid)
{
	u32 *slot = lookup(MAP_SLOTS, &tid);

	return slot ? *slot : NO_SLOT;
}

static __always_inline struct thread *make_thread(u32 tid, u32 *here, u64 now)
{
	struct thread *t;
	u32 slot;

	if (!is_target() || bpf_map_pop_elem((void *)bpf_pseudo_fd(1, MAP_FREE), &slot))
		return 0;
	t = lookup(MAP_THREADS, &slot);
	if (t) {
		t->tid = tid;
		t->pid = bpf_get_current_pid_tgid() >> 32;
		t->first_ns = t->since_ns = now;
		t->vcpu_id = -1;
		bpf_get_current_comm(t->comm, sizeof(t->comm));
		update(MAP_SLOTS, &tid, &slot);
		*here = slot;
	}
	return t;
}

static __always_inline u32 *this_cpu(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return lookup(MAP_HERE, &cpu);
}

/*
 * sched_switch is attached first and as a BTF tracepoint never missed, so what the CPU notes is the entry of the thread
 * that runs on it. Programs on plain tracepoints are skipped where bpf(2) at work on a map was preempted: CHECK_TID.
 */
static __always_inline struct thread *noted_thread(u32 *here)
{
	u32 slot = *here;
	struct thread *t = lookup(MAP_THREADS, &slot);

#ifdef CHECK_TID
	if (t && t->tid != (u32)bpf_get_current_pid_tgid()) {
		slot = find_slot(bpf_get_current_pid_tgid());
		t = lookup(MAP_THREADS, &slot);
	}
#endif
	return t;
}

static __always_inline struct thread *this_thread(u64 now)
{
	u32 *here = this_cpu(), slot, tid;
	struct thread *t;

	if (!here)
		return 0;
	t = noted_thread(here);
	if (t)
		return t;
	tid = bpf_get_current_pid_tgid();
	slot = find_slot(tid);
	if (slot == NO_SLOT)
		return make_thread(tid, here, now);
	*here = slot;
	return lookup(MAP_THREADS, &slot);
}

static __always_inline void enter_phase(struct thread *t, u32 phase, u64 now)
{
	u32 old = t->phase;

	opaque(old);
	t->time_ns[old & (N_PHASES - 1)] += now - t->since_ns;
	t->since_ns = now;
	t->phase = phase;
}

static __always_inline void add_sample(struct cell *cell, u64 ns)
{
	u32 bucket = ns ? bpf_log2l(ns) - 1 : 0;

	if (bucket >= N_BUCKETS)
		bucket = N_BUCKETS - 1;
	cell->samples++;
	cell->total_ns += ns;
	if (ns > cell->max_ns)
		cell->max_ns = ns;
	opaque(bucket);
	cell->buckets[bucket & (N_BUCKETS - 1)]++;
}

#ifdef MAP_ALARMS
static __always_inline u64 waited(struct thread *t)
{
	return t->time_ns[PHASE_BLOCKED] + t->time_ns[PHASE_PREEMPTED];
}

static __always_inline void raise_alarm(struct thread *t, u32 kind, u32 code, u64 now, u64 ns, u64 waited_ns)
{
	struct alarm alarm = { now, ns, waited_ns, t->tid, t->pid, t->vcpu_id, kind, code, t->isa };

	bpf_map_push_elem((void *)bpf_pseudo_fd(1, MAP_ALARMS), &alarm, 0);  /* full: whoever reads it knows enough */
}

static __always_inline void watch_exit(struct thread *t, u32 kind, u32 code, u64 now, u64 since, u64 before)
{
	u64 left_out = waited(t) - before, ns = now - since;

	if (ns > left_out && ns - left_out >= SLOW_NS)
		raise_alarm(t, kind, code, now, ns - left_out, left_out);
}
#endif

static __always_inline u32 exit_cell(u32 code, u32 isa)
{
	if (isa == ISA_VMX)
		code &= 0xffff;
	if (code < FIRST_NPF)
		return code;
	if (isa != ISA_VMX && code >= SVM_NPF && code <= SVM_NPF + LAST_NPF - FIRST_NPF)
		return code - SVM_NPF + FIRST_NPF;
	return CELL_OTHER;
}

static __always_inline struct cell *find_other(u32 code)
{
	struct other_key key = { bpf_get_current_pid_tgid(), code };
	struct cell *cell = lookup(MAP_OTHERS, &key);

	if (!cell) {
		struct cell fresh = {};  /* in here: clearing it costs as much as the rest */

		update(MAP_OTHERS, &key, &fresh);
		cell = lookup(MAP_OTHERS, &key);
	}
	return cell;
}

static __always_inline struct cell *find_cell(struct thread *t)
{
	u32 index = t->exit_cell;

	opaque(index);
	if (index != CELL_OTHER)
		return &t->exits[index & (N_EXITS - 1)];
	return find_other(t->exit_code);
}

/* The thread is back in KVM_RUN. */
static __always_inline void end_stay(struct thread *t, u64 now)
{
	u32 cell = t->left_cell;

	opaque(cell);
	if (t->left_ns) {
		add_sample(&t->userspace[cell & (N_USERSPACE - 1)], now - t->left_ns);
#ifdef MAP_ALARMS
		watch_exit(t, ALARM_USERSPACE, cell, now, t->left_ns, t->left_waited);
#endif
	}
	t->left_ns = 0;
}

#ifdef EXIT_REASON
static __always_inline struct thread *begin_exit(u32 code, u32 isa)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = this_thread(now);
	struct cell *cell;

	if (!t)
		return 0;
	if (t->phase == PHASE_GUEST)
		add_sample(&t->guest, now - t->since_ns);
	enter_phase(t, PHASE_KERNEL, now);
	t->exit_ns = now;
#ifdef MAP_ALARMS
	t->exit_waited = waited(t);
#endif
	t->isa = isa;
	t->exit_code = code;
	t->exit_cell = exit_cell(code, isa);
	cell = find_cell(t);
	if (cell)
		cell->count++;
	return t;
}

static __always_inline int count_entry(void)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = this_thread(now);
	struct cell *cell;

	if (!t)
		return 1;
#ifdef KVM_RUN_UNSEEN
	end_stay(t, now);
#endif
	if (t->exit_ns) {
		cell = find_cell(t);
		if (cell)
			add_sample(cell, now - t->exit_ns);
#ifdef MAP_ALARMS
		watch_exit(t, ALARM_EXIT, t->exit_code, now, t->exit_ns, t->exit_waited);
#endif
		t->exit_ns = 0;
	}
	t->guest.count++;
	enter_phase(t, PHASE_GUEST, now);
	return 1;
}

int on_kvm_exit(void *ctx)
{
	struct thread *t = begin_exit(EXIT_REASON(ctx), EXIT_ISA(ctx));

#ifdef EXIT_VCPU_OFFSET
	if (t)
		t->vcpu_id = RECORD(u32, EXIT_VCPU_OFFSET);
#endif
	return 1;
}

int on_kvm_entry(void *ctx) { return count_entry(); }
int raw_kvm_entry(void *ctx) { return count_entry(); }
#endif

#ifdef RAW_EXIT
/* KVM's own structures, as kvm_exit's record is made of them; reading them needs a kernel that is not locked down. */
static __always_inline u32 read_exit_reason(void *vcpu, u32 isa)
{
	u32 code = -1;
#ifdef VMCB_POINTER_AT
	void *vmcb = 0;
#endif
#ifdef VMX_EXIT_REASON_AT
	if (isa == ISA_VMX)
		bpf_probe_read_kernel(&code, sizeof(code), vcpu + VMX_EXIT_REASON_AT);
#endif
#ifdef VMCB_POINTER_AT
	if (isa != ISA_VMX && !bpf_probe_read_kernel(&vmcb, sizeof(vmcb), vcpu + VMCB_POINTER_AT))
		bpf_probe_read_kernel(&code, sizeof(code), vmcb + VMCB_EXIT_CODE_AT);
#endif
	return code;
}

int raw_kvm_exit(void *ctx)
{
	void *vcpu = ARGUMENT(void *, EXIT_VCPU_ARG);
	u32 isa = ARGUMENT(u32, EXIT_ISA_ARG);
	struct thread *t;
	u32 id;

#ifdef EXIT_REASON_ARG
	t = begin_exit(ARGUMENT(u32, EXIT_REASON_ARG), isa);
#else
	t = begin_exit(read_exit_reason(vcpu, isa), isa);
#endif
	if (t && t->vcpu != (u64)vcpu && !bpf_probe_read_kernel(&id, sizeof(id), vcpu + VCPU_ID_AT)) {
		t->vcpu_id = id;
		t->vcpu = (u64)vcpu;
	}
	return 1;
}
#endif

static __always_inline int count_userspace_exit(u32 reason, s32 error)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = this_thread(now);
	u32 cell = reason < CELL_INTERRUPTED ? reason : CELL_ERROR;

	if (!t)
		return 1;
	if (error < 0)
		cell = error == -4 /* -EINTR */ ? CELL_INTERRUPTED : CELL_ERROR;
	opaque(cell);
	t->userspace[cell & (N_USERSPACE - 1)].count++;
	t->left_cell = cell;
	t->left_ns = now;
	enter_phase(t, PHASE_USERSPACE, now);
#ifdef MAP_ALARMS
	t->left_waited = waited(t);  /* behind enter_phase: a switch to it may not have been traced, and it waited until now */
#endif
	return 1;
}

/* KVM loads the guest's FPU state once, when KVM_RUN begins. */
static __always_inline int count_kvm_run(u32 loads)
{
	struct thread *t;
	u64 now;

	if (!loads)
		return 1;
	now = bpf_ktime_get_ns();
	t = this_thread(now);
	if (!t)
		return 1;
	end_stay(t, now);
	enter_phase(t, PHASE_KERNEL, now);
	return 1;
}

static __always_inline int count_switch(u32 next, u32 away)
{
	u32 *here = this_cpu(), slot;
	struct thread *t;
	u64 now = 0;

	if (!here)
		return 1;
	t = noted_thread(here);
	if (t) {
		now = bpf_ktime_get_ns();
		t->n_switches++;
		t->resume = t->phase;
		enter_phase(t, away, now);
	}
	slot = find_slot(next);
	*here = slot;
	t = lookup(MAP_THREADS, &slot);
	if (t) {
		if (!now)
			now = bpf_ktime_get_ns();
#ifdef RUN_DELAY_NS
		if (t->phase == PHASE_PREEMPTED && now - t->since_ns >= RUN_DELAY_NS)
			raise_alarm(t, ALARM_RUN_DELAY, 0, now, now - t->since_ns, 0);
#endif
		enter_phase(t, t->resume, now);
	}
	return 1;
}

#ifdef RUN_DELAY_NS
/* From its wake-up on a thread waits for a CPU; it is on none, so nobody else touches its entry. */
static __always_inline int count_wakeup(u32 tid)
{
	u32 slot = find_slot(tid);
	struct thread *t = lookup(MAP_THREADS, &slot);

	if (t && t->phase == PHASE_BLOCKED)
		enter_phase(t, PHASE_PREEMPTED, bpf_ktime_get_ns());
	return 1;
}

int on_sched_wakeup(void *ctx) { return count_wakeup(RECORD(u32, WAKEUP_PID_OFFSET)); }

#if defined(WAKEUP_TASK_ARG) && defined(TASK_PID_AT)
int raw_sched_wakeup(void *ctx)
{
	void *task = *(void **)(ctx + 8 * WAKEUP_TASK_ARG);

	return count_wakeup(*(volatile u32 *)(task + TASK_PID_AT));
}
#endif
#endif

int on_sched_switch(void *ctx)
{
	u64 state = RECORD(u64, PREV_STATE_OFFSET);
	u32 away = state & RECORD_GONE ? PHASE_ENDED : state & 0xff ? PHASE_BLOCKED : PHASE_PREEMPTED;

	return count_switch(RECORD(u32, NEXT_PID_OFFSET), away);
}

#ifdef SWITCH_NEXT_ARG
/* What the plain tracepoint makes of these: __trace_sched_switch_state(), include/trace/events/sched.h */
int raw_sched_switch(void *ctx)
{
	u32 state = ARGUMENT(u32, SWITCH_STATE_ARG), preempted = ARGUMENT(u8, SWITCH_PREEMPT_ARG);
	u32 away = preempted || !state ? PHASE_PREEMPTED : state & TASK_DEAD ? PHASE_ENDED : PHASE_BLOCKED;
	void *next = *(void **)(ctx + 8 * SWITCH_NEXT_ARG);  /* typed: the verifier lets it be read */

	return count_switch(*(volatile u32 *)(next + TASK_PID_AT), away);
}
#endif

int on_kvm_userspace_exit(void *ctx)
{
	return count_userspace_exit(RECORD(u32, USERSPACE_REASON_OFFSET), RECORD(s32, USERSPACE_ERRNO_OFFSET));
}

int on_kvm_fpu(void *ctx) { return count_kvm_run(RECORD(u32, FPU_LOAD_OFFSET)); }

#ifdef USERSPACE_REASON_ARG
int raw_kvm_userspace_exit(void *ctx)
{
	return count_userspace_exit(ARGUMENT(u32, USERSPACE_REASON_ARG), ARGUMENT(s32, USERSPACE_ERRNO_ARG));
}
#endif

#ifdef FPU_LOAD_ARG
int raw_kvm_fpu(void *ctx) { return count_kvm_run(ARGUMENT(u32, FPU_LOAD_ARG)); }
#endif
