/*
 * Maps, and whose events are wanted. The loader defines MAP_* and, unless the whole machine is traced, TARGETED and
 * TARGET_TGID. All are placeholders in 64-bit loads, which it replaces in the compiled program: so what was compiled
 * once serves every recording with the same events.
 */
#define CONSTANT(placeholder) bpf_pseudo_fd(0, placeholder)
#define KERNEL_VARIABLE(id) ((void *)bpf_pseudo_fd(3 /* BPF_PSEUDO_BTF_ID */, id))
#define lookup(fd, key) bpf_map_lookup_elem_(bpf_pseudo_fd(1, fd), key)
#define update(fd, key, value) bpf_map_update_elem_(bpf_pseudo_fd(1, fd), key, value, 0 /* BPF_ANY */)

/* Is this thread one of the target's? Threads and processes it starts are added by follow.c. */
static __always_inline int is_target_tid(u32 tid)
{
#ifdef TARGETED
	return lookup(MAP_TIDS, &tid) != 0;
#else
	return 1;
#endif
}

static __always_inline int is_target(void)
{
#ifdef TARGETED
	u64 id = bpf_get_current_pid_tgid();

#ifdef TARGET_TGID
	if (id >> 32 == CONSTANT(TARGET_TGID))
		return 1;
#endif
	return is_target_tid(id);
#else
	return 1;
#endif
}
