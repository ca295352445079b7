/*
 * No events: per thread and exit reason a count, a time and a log2 histogram, and how the thread's time was spent.
 * kvmtrace record --summary writes what stands here at the end, kvmtrace top shows it while it grows.
 *
 * A thread's entry is only touched by the thread itself, or by the context switch that takes it off or puts it on a
 * CPU: so nothing here is atomic, and a VM-exit costs two look-ups. The loader defines MAP_THREADS, MAP_OTHERS and,
 * by the format files, *_OFFSET.
 */
#define ISA_VMX 1

/* How a thread spends its time; index of time_ns. */
#define PHASE_UNKNOWN 0     /* before its first event */
#define PHASE_GUEST 1       /* kvm_entry to kvm_exit */
#define PHASE_KERNEL 2      /* in KVM_RUN, not in the guest; with a KVM that has no kvm_entry: in KVM_RUN */
#define PHASE_USERSPACE 3   /* kvm_userspace_exit to the next KVM_RUN */
#define PHASE_BLOCKED 4     /* off its CPU, sleeping */
#define PHASE_PREEMPTED 5   /* off its CPU, runnable */
#define PHASE_ENDED 6       /* the thread is gone */
#define N_PHASES 8          /* a power of two: the verifier trusts masks more than comparisons */
#define TASK_GONE 0x30      /* EXIT_DEAD | EXIT_ZOMBIE, include/linux/sched.h */

#define N_BUCKETS 32        /* bucket i: 2^i to 2^(i+1)-1 ns, the last also all above */

/* Hides what the compiler knows of a value, so that it keeps the mask that the verifier needs to see. */
#define opaque(value) asm volatile("" : "+r"(value))

struct cell {
	u64 count;          /* times it happened */
	u64 samples;        /* of them, how many ended (the durations below) */
	u64 total_ns;
	u64 max_ns;
	u32 buckets[N_BUCKETS];
};

/* Exit cells: VMX basic reasons and SVM codes below 0xb0 directly, SVM 0x400..0x40f from 0xb0 on. */
#define N_EXITS 256
#define SVM_NPF 0x400
#define FIRST_NPF 0xb0
#define LAST_NPF 0xbf
#define CELL_OTHER 0xff     /* any other code: in MAP_OTHERS */
/* Userspace cells: KVM_EXIT_* below 62; -EINTR, other errors. */
#define N_USERSPACE 64
#define CELL_INTERRUPTED 62
#define CELL_ERROR 63

struct thread {
	u64 since_ns;       /* the phase began */
	u64 first_ns;
	u64 exit_ns;        /* VM-exit under way, 0: none */
	u64 left_ns;        /* userspace exit under way, 0: none */
	u64 time_ns[N_PHASES];
	u64 n_switches;
	u32 pid;
	u32 vcpu_id;
	u32 isa;
	u32 phase;
	u32 resume;         /* phase to return to when it is on a CPU again */
	u32 exit_code;
	u32 exit_cell;
	u32 left_cell;
	char comm[16];
	struct cell guest;
	struct cell exits[N_EXITS];
	struct cell userspace[N_USERSPACE];
};

struct other_key {
	u32 tid;
	u32 exit_code;
};

static __always_inline struct thread *known_thread(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	return lookup(MAP_THREADS, &tid);
}

static __always_inline struct thread *this_thread(u64 now)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct thread *t = lookup(MAP_THREADS, &tid);
	u32 zero = 0;
	struct thread *blank;

	if (t || !is_target())
		return t;
	blank = lookup(MAP_BLANK, &zero);
	if (!blank || !blank->resume)  /* the loader sets it once all programs are attached */
		return 0;
	bpf_map_update_elem_(bpf_pseudo_fd(1, MAP_THREADS), &tid, blank, 1 /* BPF_NOEXIST */);
	t = lookup(MAP_THREADS, &tid);
	if (t) {
		t->pid = bpf_get_current_pid_tgid() >> 32;
		t->first_ns = t->since_ns = now;
		t->vcpu_id = -1;
		bpf_get_current_comm(t->comm, sizeof(t->comm));
		t->resume = PHASE_UNKNOWN;
	}
	return t;
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

static __always_inline struct cell *find_cell(struct thread *t)
{
	struct other_key key = { bpf_get_current_pid_tgid(), t->exit_code };
	u32 index = t->exit_cell;
	struct cell fresh = {}, *cell;

	opaque(index);
	if (index != CELL_OTHER)
		return &t->exits[index & (N_EXITS - 1)];
	cell = lookup(MAP_OTHERS, &key);
	if (cell)
		return cell;
	update(MAP_OTHERS, &key, &fresh);
	return lookup(MAP_OTHERS, &key);
}

#ifdef EXIT_REASON_OFFSET
static __always_inline int count_exit(void *ctx)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = this_thread(now);
	struct cell *cell;

	if (!t)
		return 1;
	if (t->phase == PHASE_GUEST)
		add_sample(&t->guest, now - t->since_ns);
	enter_phase(t, PHASE_KERNEL, now);
	t->exit_ns = now;
	t->isa = *(volatile u32 *)(ctx + EXIT_ISA_OFFSET);
	t->exit_code = *(volatile u32 *)(ctx + EXIT_REASON_OFFSET);
	t->exit_cell = exit_cell(t->exit_code, t->isa);
#ifdef EXIT_VCPU_OFFSET
	t->vcpu_id = *(volatile u32 *)(ctx + EXIT_VCPU_OFFSET);
#endif
	cell = find_cell(t);
	if (cell)
		cell->count++;
	return 1;
}

static __always_inline int count_entry(void)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = this_thread(now);
	struct cell *cell;

	if (!t)
		return 1;
	if (t->exit_ns) {
		cell = find_cell(t);
		if (cell)
			add_sample(cell, now - t->exit_ns);
		t->exit_ns = 0;
	}
	t->guest.count++;
	enter_phase(t, PHASE_GUEST, now);
	return 1;
}

int on_kvm_exit(void *ctx) { return count_exit(ctx); }
int on_kvm_entry(void *ctx) { return count_entry(); }
#endif

static __always_inline int count_userspace_exit(void *ctx)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = this_thread(now);
	u32 reason = *(volatile u32 *)(ctx + USERSPACE_REASON_OFFSET);
	s32 error = *(volatile s32 *)(ctx + USERSPACE_ERRNO_OFFSET);
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
	return 1;
}

/* KVM loads the guest's FPU state once, when KVM_RUN begins. */
static __always_inline int count_kvm_run(void *ctx)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t;
	u32 cell;

	if (!*(volatile u32 *)(ctx + FPU_LOAD_OFFSET))
		return 1;
	t = this_thread(now);
	if (!t)
		return 1;
	cell = t->left_cell;
	opaque(cell);
	if (t->left_ns)
		add_sample(&t->userspace[cell & (N_USERSPACE - 1)], now - t->left_ns);
	t->left_ns = 0;
	enter_phase(t, PHASE_KERNEL, now);
	return 1;
}

static __always_inline int count_switch(void *ctx)
{
	u32 next = *(volatile u32 *)(ctx + NEXT_PID_OFFSET);
	u64 state = *(volatile u64 *)(ctx + PREV_STATE_OFFSET);
	struct thread *t = known_thread();
	u64 now;

	if (t) {
		now = bpf_ktime_get_ns();
		t->n_switches++;
		t->resume = t->phase;
		enter_phase(t, state & TASK_GONE ? PHASE_ENDED : state & 0xff ? PHASE_BLOCKED : PHASE_PREEMPTED, now);
	}
	t = lookup(MAP_THREADS, &next);
	if (t)
		enter_phase(t, t->resume, bpf_ktime_get_ns());
	return 1;
}

int on_kvm_userspace_exit(void *ctx) { return count_userspace_exit(ctx); }
int on_kvm_fpu(void *ctx) { return count_kvm_run(ctx); }
int on_sched_switch(void *ctx) { return count_switch(ctx); }
