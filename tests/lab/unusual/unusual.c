/*
 * Healthy but unusual VMMs: each mode is legal use of the KVM API, and nothing of it may be called a violation.
 * `unusual MODE [ROUNDS]`; prints "ok". Build: cc -static -O1 -pthread -o unusual unusual.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#define CHECKED(call) ({ long result = (call); if (result < 0) { perror(#call); exit(1); } result; })

enum { CODE = 0x1000, STACK = 0x8000, MEMORY = 0x10000, HANDLER = 0x2000, MOST_VCPUS = 8 };

struct vcpu {
	int fd;
	struct kvm_run *run;
};

static int kvm, vm, rounds;
static unsigned char *memory;
static struct vcpu vcpus[MOST_VCPUS];

/* real mode: a port, MMIO, a read-modify-write of MMIO, CPUID, a string to a port, HLT */
static const unsigned char real_mode[] = {
	0xe4, 0x10,                   /* 1000: in al,0x10 */
	0xe6, 0x11,                   /* 1002: out 0x11,al */
	0xa0, 0x00, 0x80,             /* 1004: mov al,[0x8000], ds=0xf000: no memory at 0xf8000 */
	0xa2, 0x04, 0x80,             /* 1007: mov [0x8004],al */
	0xfe, 0x06, 0x08, 0x80,       /* 100a: inc byte [0x8008] */
	0x0f, 0xa2,                   /* 100e: cpuid */
	0x31, 0xf6,                   /* 1010: xor si,si */
	0xb9, 0x03, 0x00,             /* 1012: mov cx,3 */
	0xba, 0x12, 0x00,             /* 1015: mov dx,0x12 */
	0x26, 0xf3, 0x6e,             /* 1018: rep es: outsb */
	0xf4,                         /* 101b: hlt */
	0xeb, 0xe2,                   /* 101c: jmp 1000 */
};
enum { HLT_AT = CODE + 0x1b, CPUID_AT = CODE + 0x0e };

/* protected mode with paging: accesses that cross from one page to another one elsewhere, see map_pages() */
static const unsigned char crossing[] = {
	0xa1, 0xfe, 0x0f, 0x02, 0x00,                   /* mov eax,[0x20ffe]: device to other device */
	0xa3, 0xfe, 0x0f, 0x02, 0x00,                   /* mov [0x20ffe],eax */
	0xa1, 0xfe, 0x1f, 0x02, 0x00,                   /* mov eax,[0x21ffe]: device to memory */
	0xa3, 0xfe, 0x1f, 0x02, 0x00,                   /* mov [0x21ffe],eax */
	0xa1, 0xfe, 0x2f, 0x02, 0x00,                   /* mov eax,[0x22ffe]: memory to device */
	0xa3, 0xfe, 0x2f, 0x02, 0x00,                   /* mov [0x22ffe],eax */
	0x01, 0x05, 0xfd, 0x0f, 0x02, 0x00,             /* add [0x20ffd],eax */
	0x0f, 0x6f, 0x05, 0xff, 0x0f, 0x02, 0x00,       /* movq mm0,[0x20fff]: 1 + 7 bytes */
	0x0f, 0x7f, 0x05, 0xff, 0x0f, 0x02, 0x00,       /* movq [0x20fff],mm0 */
	0xf3, 0x0f, 0x6f, 0x05, 0xfd, 0x0f, 0x02, 0x00, /* movdqu xmm0,[0x20ffd]: 3 + 13 bytes */
	0xf3, 0x0f, 0x7f, 0x05, 0xfd, 0x0f, 0x02, 0x00, /* movdqu [0x20ffd],xmm0 */
	0xf3, 0x0f, 0x6f, 0x05, 0xf4, 0x1f, 0x02, 0x00, /* movdqu xmm0,[0x21ff4]: 12 + 4 bytes, to memory */
	0xf3, 0x0f, 0x7f, 0x05, 0xf4, 0x2f, 0x02, 0x00, /* movdqu [0x22ff4],xmm0: 12 + 4 bytes, from memory */
	0xf4,                                           /* hlt */
	0xeb, 0xab,                                     /* jmp to the begin */
};

static void map_pages(struct kvm_sregs *s)
{
	enum { DIRECTORY = 0x3000, TABLE = 0x4000 };
	unsigned *table = (unsigned *)(memory + TABLE);

	*(unsigned *)(memory + DIRECTORY) = TABLE | 3;
	for (unsigned page = 0; page < MEMORY >> 12; page++)
		table[page] = page << 12 | 3;
	table[0x20] = 0xfe000003; /* device */
	table[0x21] = 0xfd005003; /* another one, elsewhere */
	table[0x22] = 0x00009003; /* memory */
	table[0x23] = 0xfc007003; /* device */
	struct kvm_segment flat = {.limit = ~0u, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
	s->ds = s->es = s->fs = s->gs = s->ss = flat;
	flat.selector = 8;
	flat.type = 11;
	s->cs = flat;
	s->cr0 = 0x80000011;
	s->cr3 = DIRECTORY;
	s->cr4 = 0x200; /* OSFXSR */
}

static void make_vcpu(int number, int with_irqchip, int paging)
{
	static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[200]; } cpuid;
	int size = CHECKED(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	int fd = CHECKED(ioctl(vm, KVM_CREATE_VCPU, number));
	struct kvm_sregs s;
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};
	struct kvm_mp_state runnable = {KVM_MP_STATE_RUNNABLE};

	vcpus[number].fd = fd;
	vcpus[number].run = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECKED(ioctl(fd, KVM_GET_SREGS, &s));
	s.cs.base = s.cs.selector = s.es.base = s.es.selector = 0;
	s.ds.base = 0xf0000;
	s.ds.selector = 0xf000;
	if (paging)
		map_pages(&s);
	CHECKED(ioctl(fd, KVM_SET_SREGS, &s));
	CHECKED(ioctl(fd, KVM_SET_REGS, &regs));
	if (with_irqchip)
		CHECKED(ioctl(fd, KVM_SET_MP_STATE, &runnable));
	cpuid.head.nent = 200;
	CHECKED(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	CHECKED(ioctl(fd, KVM_SET_CPUID2, &cpuid));
}

static void make_vm(int n_vcpus, int with_irqchip, int paging)
{
	vm = CHECKED(ioctl(kvm, KVM_CREATE_VM, 0));
	CHECKED(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
	if (with_irqchip)
		CHECKED(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
	memory = mmap(0, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memcpy(memory + CODE, paging ? crossing : real_mode, paging ? sizeof crossing : sizeof real_mode);
	struct kvm_userspace_memory_region region = {0, 0, 0, MEMORY, (unsigned long)memory};
	CHECKED(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	for (int i = 0; i < n_vcpus; i++)
		make_vcpu(i, with_irqchip, paging);
}

/* One KVM_RUN, its access served; returns the exit reason, -1 for EINTR. */
static int run_once(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;

	if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
		if (errno == EINTR)
			return -1;
		perror("KVM_RUN");
		exit(1);
	}
	if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_IN)
		memset((char *)run + run->io.data_offset, 0x42, run->io.size * run->io.count);
	if (run->exit_reason == KVM_EXIT_MMIO && !run->mmio.is_write)
		memset(run->mmio.data, 7, sizeof run->mmio.data);
	if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR || run->exit_reason == KVM_EXIT_FAIL_ENTRY ||
	    run->exit_reason == KVM_EXIT_SHUTDOWN) {
		printf("exit reason %d\n", run->exit_reason);
		exit(2);
	}
	return run->exit_reason;
}

/* Put an interrupt or NMI handler into the guest's real-mode vector table. */
static void set_handler(int vector, const void *code, size_t size)
{
	memory[vector * 4] = HANDLER & 0xff;
	memory[vector * 4 + 1] = HANDLER >> 8;
	memory[vector * 4 + 2] = memory[vector * 4 + 3] = 0;
	memcpy(memory + HANDLER, code, size);
}

static void set_rip(struct vcpu *vcpu, unsigned long rip)
{
	struct kvm_regs regs;

	CHECKED(ioctl(vcpu->fd, KVM_GET_REGS, &regs));
	regs.rip = rip;
	CHECKED(ioctl(vcpu->fd, KVM_SET_REGS, &regs));
}

static void several_vcpus(int n)
{
	make_vm(n, 0, 0);
	for (int i = 0; i < rounds * n; i++)
		run_once(&vcpus[n == 2 ? i & 1 : i * 7 / 3 % n]);
}

static void two_vcpus(void) { several_vcpus(2); }
static void three_vcpus(void) { several_vcpus(3); }

static void two_vms(void)
{
	struct vcpu of_vm[2];

	for (int i = 0; i < 2; i++) {
		make_vm(1, 0, 0);
		of_vm[i] = vcpus[0];
	}
	for (int i = 0; i < rounds * 2; i++)
		run_once(&of_vm[i & 1]);
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long turn;
static int left;

static void *take_turns(void *argument)
{
	long me = (long)argument;

	pthread_mutex_lock(&lock);
	while (left > 0) {
		while (turn != me && left > 0)
			pthread_cond_wait(&changed, &lock);
		if (left <= 0)
			break;
		run_once(&vcpus[0]);
		left--;
		turn = !me;
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

/* Two threads take turns at one vCPU. */
static void handover(void)
{
	pthread_t threads[2];

	make_vm(1, 0, 0);
	left = rounds * 2;
	for (long i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, take_turns, (void *)i);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
}

/* RIP is moved through KVM_CAP_SYNC_REGS, by a VMM that also uses KVM_SET_REGS. */
static void sync_regs(void)
{
	struct kvm_run *run;

	make_vm(1, 0, 0);
	run = vcpus[0].run;
	run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	for (int i = 0; i < rounds; i++) {
		if (run_once(&vcpus[0]) == KVM_EXIT_IO && i % 5 == 0)
			run_once(&vcpus[0]);
		if (i % 7 == 3) {
			run->s.regs.regs.rip = CODE;
			run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
		}
	}
}

/* Every other KVM_RUN only completes what is pending. */
static void immediate_exit(void)
{
	make_vm(1, 0, 0);
	for (int i = 0; i < rounds; i++) {
		vcpus[0].run->immediate_exit = 1;
		run_once(&vcpus[0]);
		vcpus[0].run->immediate_exit = 0;
		run_once(&vcpus[0]);
	}
}

/* Registers are written back unchanged, and RIP is moved once what is pending is complete. */
static void set_registers(void)
{
	struct kvm_regs regs;

	make_vm(1, 0, 0);
	for (int i = 0; i < rounds; i++) {
		run_once(&vcpus[0]);
		if (i % 3 == 1) {
			CHECKED(ioctl(vcpus[0].fd, KVM_GET_REGS, &regs));
			CHECKED(ioctl(vcpus[0].fd, KVM_SET_REGS, &regs));
		}
		if (i % 10 == 9) {
			vcpus[0].run->immediate_exit = 1;
			run_once(&vcpus[0]);
			vcpus[0].run->immediate_exit = 0;
			set_rip(&vcpus[0], CODE);
		}
	}
}

static void do_nothing(int signal) { (void)signal; }

static void signals(void)
{
	struct sigaction action = {.sa_handler = do_nothing};
	struct itimerval often = {{0, 700}, {0, 700}};

	make_vm(1, 0, 0);
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	for (int i = 0; i < rounds * 4; i++)
		run_once(&vcpus[0]);
}

static void single_step(void)
{
	struct kvm_guest_debug debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP};

	make_vm(1, 0, 0);
	CHECKED(ioctl(vcpus[0].fd, KVM_SET_GUEST_DEBUG, &debug));
	for (int i = 0; i < rounds * 2; i++)
		run_once(&vcpus[0]);
}

static void breakpoint(void)
{
	struct kvm_guest_debug debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP};

	make_vm(1, 0, 0);
	debug.arch.debugreg[0] = CPUID_AT;
	debug.arch.debugreg[7] = 0x400 | 1;
	CHECKED(ioctl(vcpus[0].fd, KVM_SET_GUEST_DEBUG, &debug));
	for (int i = 0; i < rounds; i++)
		if (run_once(&vcpus[0]) == KVM_EXIT_DEBUG)
			set_rip(&vcpus[0], CPUID_AT + 2);
}

/* The interrupt controllers are the VMM's: KVM_INTERRUPT whenever the guest can take one. */
static void interrupts(void)
{
	static const unsigned char push_pop_iret[] = {0x50, 0x58, 0xcf};
	static const unsigned char sti_nop_jmp[] = {0xfb, 0x90, 0xeb, 0xe1};
	struct kvm_interrupt request = {0x30};

	make_vm(1, 0, 0);
	memcpy(memory + HLT_AT, sti_nop_jmp, sizeof sti_nop_jmp);
	set_handler(0x30, push_pop_iret, sizeof push_pop_iret);
	for (int i = 0; i < rounds * 3; i++) {
		vcpus[0].run->request_interrupt_window = 1;
		run_once(&vcpus[0]);
		if (vcpus[0].run->ready_for_interrupt_injection)
			CHECKED(ioctl(vcpus[0].fd, KVM_INTERRUPT, &request));
	}
}

static void nmis(void)
{
	static const unsigned char out_iret[] = {0xe6, 0x20, 0xcf};

	make_vm(1, 1, 0);
	memory[HLT_AT] = 0x90;
	set_handler(2, out_iret, sizeof out_iret);
	for (int i = 0; i < rounds; i++) {
		run_once(&vcpus[0]);
		if (i % 4 == 2)
			CHECKED(ioctl(vcpus[0].fd, KVM_NMI, 0));
	}
}

static void cross_pages(void)
{
	make_vm(1, 0, 1);
	for (int i = 0; i < rounds; i++)
		run_once(&vcpus[0]);
}

static const struct { const char *name; void (*run)(void); } modes[] = {
	{"two-vcpus", two_vcpus},           {"three-vcpus", three_vcpus}, {"two-vms", two_vms},
	{"handover", handover},             {"sync-regs", sync_regs},     {"immediate-exit", immediate_exit},
	{"set-registers", set_registers},   {"signals", signals},         {"single-step", single_step},
	{"breakpoint", breakpoint},         {"interrupts", interrupts},   {"nmis", nmis},
	{"cross-pages", cross_pages},
};

int main(int argc, char **argv)
{
	rounds = argc > 2 ? atoi(argv[2]) : 300;
	kvm = CHECKED(open("/dev/kvm", O_RDWR));
	for (unsigned i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(modes[i].name, argv[1])) {
			modes[i].run();
			puts("ok");
			return 0;
		}
	return 3;
}
