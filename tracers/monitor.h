/*
 * The automaton of KVM_RUN, stepped by a look-up; and what monitor.c keeps of each thread. kvmtrace/capture/bpf/monitor.py
 * reads it; tests compile monitor_step() for user space and hold it against the checker's.
 *
 * The table has a byte per state and step: the next state plus one, 0xff where no row of the model allows the step. State
 * 0 knows nothing and allows every step; every step leads to one state, whatever the state before.
 */
#define N_STATES 16      /* powers of two: the verifier trusts masks more than comparisons */
#define N_STEPS 32
#define FORBIDDEN 0xff
#define N_LAST 32

struct past_step {
	u64 ts_ns;
	u32 step;
	u32 before;         /* the state that it found */
};

struct trail {
	u64 n_steps;        /* of them the last ones stand in last[], step i at i % N_LAST */
	u64 n_forbidden;
	u32 tid;
	u32 pid;
	u32 state;
	u32 unused;
	struct past_step last[N_LAST];
};

/* Take a step; returns its place in the table, with FORBIDDEN << 16 set if the model does not allow it. */
static __always_inline u32 monitor_step(struct trail *t, const unsigned char *table, u32 step, u64 now)
{
	u32 state = t->state & (N_STATES - 1);
	u32 place = state * N_STEPS + (step & (N_STEPS - 1));
	struct past_step *past = &t->last[t->n_steps & (N_LAST - 1)];
	u32 next = table[place];
	u32 forbidden = next == FORBIDDEN;

	past->ts_ns = now;
	past->step = step;
	past->before = state;
	t->n_steps++;
	t->n_forbidden += forbidden;
	if (forbidden)
		next = table[step & (N_STEPS - 1)]; /* as from the state that knows nothing */
	t->state = next - 1;
	return place | (forbidden ? FORBIDDEN << 16 : 0);
}
