/*
 * Context switches of the target's threads, off a CPU and onto one: kept if either side is a thread of the target,
 * as ftrace's set_event_pid does. NEXT_PID_OFFSET comes from the tracepoint's format file.
 */
#define SCHED_SWITCH(name, kind, size, copies) \
	RECORD_IF(is_target() || is_target_tid(*(volatile u32 *)(ctx + NEXT_PID_OFFSET)), 1, name, kind, size, copies)
