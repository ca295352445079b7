/*
 * What every tracer writes: one record per event into the ring buffer of the CPU it happened on.
 *
 * The loader defines MAP_RINGS, MAP_CPUS, MAP_LOST, N_KINDS, WAKE_EVERY (a power of two), and, where the kernel shows
 * it, PREEMPT_COUNT_BTF_ID.
 */
/* include/linux/trace_events.h, enum trace_flag_type */
#define TRACE_FLAG_IRQS_NOSUPPORT 0x02
#define TRACE_FLAG_HARDIRQ 0x08
#define TRACE_FLAG_SOFTIRQ 0x10
#define TRACE_FLAG_NMI 0x40

struct record {
	u64 ts_ns;          /* CLOCK_MONOTONIC */
	u32 tid;
	u32 pid;            /* the process: the kernel's tgid */
	u32 lost;           /* events lost on this CPU so far, modulo 2^32 */
	u16 kind;           /* index into the file's table of kinds */
	u8 irq_flags;
	u8 preempt_count;
	u64 data[0];        /* the tracepoint's record from its byte 8 on, or a probe's values */
};

struct cpu_state {
	u64 lost;
	u64 filtered;
	u64 recorded;
	u64 hardirqs;       /* interrupts under way, see interrupt.c */
	u64 softirqs;
	u64 running;        /* the recorder maps these pages and switches all programs on and off at once */
	u64 padding[2];     /* a cache line of its own */
};

#ifdef PREEMPT_COUNT_BTF_ID
/* include/linux/preempt.h: bits 0-7 preemption, 8-15 softirq, 16-19 hardirq, 20-23 NMI. `own` is how often the
 * mechanism that calls the program has disabled preemption: tracepoints and kprobes once, fentry not. */
static __always_inline void set_context(struct record *r, struct cpu_state *state, u32 own)
{
	u32 *count = bpf_this_cpu_ptr(KERNEL_VARIABLE(PREEMPT_COUNT_BTF_ID));
	u32 n = *count;
	u8 flags = TRACE_FLAG_IRQS_NOSUPPORT;

	if (n & 0x00f00000)
		flags |= TRACE_FLAG_NMI;
	if (n & 0x000f0000)
		flags |= TRACE_FLAG_HARDIRQ;
	if (n & 0x00000100)  /* serving, not merely disabled */
		flags |= TRACE_FLAG_SOFTIRQ;
	r->irq_flags = flags;
	n &= 0xff;
	n = n > own ? n - own : 0;
	r->preempt_count = n > 15 ? 15 : n;
}
#else
/* The kernel does not show its preemption counter: interrupt.c counts interrupts under way. */
static __always_inline void set_context(struct record *r, struct cpu_state *state, u32 own)
{
	u8 flags = TRACE_FLAG_IRQS_NOSUPPORT;

	if (state->hardirqs)
		flags |= TRACE_FLAG_HARDIRQ;
	if (state->softirqs)
		flags |= TRACE_FLAG_SOFTIRQ;
	r->irq_flags = flags;
	r->preempt_count = 0;
}
#endif

static __always_inline struct cpu_state *this_cpu(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return lookup(MAP_CPUS, &cpu);
}

/* With fentry and raw tracepoints an interrupt's program can run inside another one; perf's tracepoints and kprobes
 * exclude that. */
#ifdef PROGRAMS_NEST
#define count(counter) __sync_fetch_and_add(&(counter), 1)
#else
#define count(counter) (counter)++
#endif

static __always_inline void count_lost(struct cpu_state *state, u32 kind)
{
	u32 cell = bpf_get_smp_processor_id() * N_KINDS + kind;
	u64 *lost = lookup(MAP_LOST, &cell);

	count(state->lost);
	if (lost)
		count(*lost);
}

/*
 * A record of `size` bytes of data with its header filled in, or NULL (then the loss is counted). `flags` is for
 * submit(): the recorder looks on its own, and is woken every WAKE_EVERY records in case they come fast.
 */
static __always_inline struct record *reserve(u32 kind, u32 size, u32 own, u64 *flags)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *state = lookup(MAP_CPUS, &cpu);
	void *ring = lookup(MAP_RINGS, &cpu);
	struct record *r;
	u64 id;

	if (!state || !ring || !state->running)
		return 0;
	r = bpf_ringbuf_reserve(ring, sizeof(*r) + size, 0);
	if (!r) {
		count_lost(state, kind);
		return 0;
	}
	id = bpf_get_current_pid_tgid();
	r->ts_ns = bpf_ktime_get_ns();
	r->tid = id;
	r->pid = id >> 32;
	count(state->recorded);
	*flags = state->recorded & (WAKE_EVERY - 1) ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP;
	r->lost = state->lost;
	r->kind = kind;
	set_context(r, state, own);
	return r;
}


static __always_inline void count_filtered(void)
{
	struct cpu_state *state = this_cpu();

	if (state)
		count(state->filtered);
}
