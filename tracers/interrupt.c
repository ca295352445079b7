/*
 * Which CPU is serving an interrupt, where the kernel does not show its preemption counter to programs. KVM's timers
 * and interrupt routing trace events from interrupts; they carry the interrupted thread's id but are not its doing.
 * Hung on irq_vectors:*_entry/_exit, irq:irq_handler_entry/exit, irq:softirq_entry/exit. Writes no records.
 *
 * On raw tracepoints these run even where they interrupt another program. (On plain ones, an interrupt that arrives
 * while a program runs is not seen at all, its end neither: the counters stay balanced.) Exits are attached first, so
 * that an interrupt under way at that moment does no harm.
 */
#define INTERRUPT(name, counter, step) \
	int name(void *ctx) \
	{ \
		struct cpu_state *state = this_cpu(); \
		if (state && ((step) > 0 || state->counter)) \
			state->counter += (step); \
		return 1; \
	}

INTERRUPT(hardirq_entry, hardirqs, 1)
INTERRUPT(hardirq_exit, hardirqs, -1)
INTERRUPT(softirq_entry, softirqs, 1)
INTERRUPT(softirq_exit, softirqs, -1)
