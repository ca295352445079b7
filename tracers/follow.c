/*
 * Follows the target: a thread or process that one of its threads starts is the target's too (as ftrace's option
 * event-fork), until the kernel frees it. Writes no records. The offsets come from the format files.
 */
static __always_inline int add_child(void *ctx)
{
	u32 child = *(volatile u32 *)(ctx + CHILD_PID_OFFSET);
	u32 one = 1;

	if (is_target())
		update(MAP_TIDS, &child, &one);
	return 1;
}

static __always_inline int drop_thread(void *ctx)
{
	u32 tid = *(volatile u32 *)(ctx + FREED_PID_OFFSET);

	bpf_map_delete_elem_(bpf_pseudo_fd(1, MAP_TIDS), &tid);
	return 1;
}

int follow_fork(void *ctx) { return add_child(ctx); }
int follow_free(void *ctx) { return drop_thread(ctx); }
