/*
 * What summary.c keeps in its maps; kvmtrace/capture/bpf/summary_maps.py reads it.
 */
#define ISA_VMX 1

/* How a thread spends its time; index of time_ns. */
#define PHASE_UNKNOWN 0     /* before its first event */
#define PHASE_GUEST 1       /* kvm_entry to kvm_exit */
#define PHASE_KERNEL 2      /* in KVM_RUN, not in the guest; with a KVM that has no kvm_entry: in KVM_RUN */
#define PHASE_USERSPACE 3   /* kvm_userspace_exit to the next KVM_RUN; KVM_RUN_UNSEEN: to the next kvm_entry */
#define PHASE_BLOCKED 4     /* off its CPU, sleeping */
#define PHASE_PREEMPTED 5   /* off its CPU, runnable */
#define PHASE_ENDED 6       /* the thread is gone */
#define N_PHASES 8          /* a power of two: the verifier trusts masks more than comparisons */
/* include/linux/sched.h: what the plain tracepoint shows of a dead task (EXIT_DEAD | EXIT_ZOMBIE), and its own state */
#define RECORD_GONE 0x30
#define TASK_DEAD 0x80

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

/* Exit cells: VMX basic reasons, SVM and arm64 codes below 0xb0 directly, SVM 0x400..0x40f from 0xb0 on. */
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
	u64 vcpu;           /* address of its struct kvm_vcpu, where that is how the number is found */
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
	u32 tid;
	u32 unused;
	char comm[16];
	struct cell guest;
	struct cell exits[N_EXITS];
	struct cell userspace[N_USERSPACE];
#ifdef MAP_ALARMS
	u64 exit_waited;    /* time blocked and preempted when the VM-exit, or the userspace exit, under way began */
	u64 left_waited;
#endif
};

/* What kvmtrace watch is told at once, by a queue: MAP_ALARMS. */
#define ALARM_EXIT 1        /* a VM-exit took SLOW_NS or more, waiting left out */
#define ALARM_USERSPACE 2   /* a userspace exit */
#define ALARM_RUN_DELAY 3   /* a vCPU was runnable and not on a CPU for RUN_DELAY_NS or more */
struct alarm {
	u64 ts_ns;          /* when it ended */
	u64 ns;             /* how long it took */
	u64 waited_ns;      /* of its time from begin to end, what is left out */
	u32 tid;
	u32 pid;
	u32 vcpu_id;
	u32 kind;
	u32 code;           /* exit reason, or userspace cell */
	u32 isa;
};

struct other_key {
	u32 tid;
	u32 exit_code;
};
