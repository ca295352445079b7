/*
 * Reproducers of docs/findings.md: each mode is a guest of a few instructions in real mode, on 64 KiB of memory.
 * `finding MODE [MILLISECONDS]` prints each exit to userspace; a KVM_RUN that does not end is interrupted after that time.
 * Build: cc -static -O1 -o finding finding.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>

#define CHECKED(call) ({ long result = (call); if (result < 0) { perror(#call); exit(1); } result; })

/* DEVICE lies behind the memory: whatever is there is MMIO. FRESH is memory that nothing has touched. */
enum { CODE = 0x1000, STACK = 0x8000, FRESH = 0xc000, MEMORY = 0x10000, DEVICE = 0xf0000, AT = 0x8000 };

static int vcpu;
static struct kvm_run *run;
static unsigned char *memory;

static void set_up(const unsigned char *code, size_t size, unsigned stack_base, unsigned stack)
{
	int kvm = CHECKED(open("/dev/kvm", O_RDWR));
	int vm = CHECKED(ioctl(kvm, KVM_CREATE_VM, 0));
	struct kvm_regs regs = {.rip = CODE, .rsp = stack, .rflags = 2};
	struct kvm_sregs s;

	CHECKED(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
	memory = mmap(0, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memcpy(memory + CODE, code, size);
	struct kvm_userspace_memory_region region = {0, 0, 0, MEMORY, (unsigned long)memory};
	CHECKED(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	vcpu = CHECKED(ioctl(vm, KVM_CREATE_VCPU, 0));
	run = mmap(0, CHECKED(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECKED(ioctl(vcpu, KVM_GET_SREGS, &s));
	s.cs.base = s.cs.selector = s.es.base = s.es.selector = 0;
	s.ds.base = DEVICE;
	s.ds.selector = DEVICE >> 4;
	s.ss.base = stack_base;
	s.ss.selector = stack_base >> 4;
	CHECKED(ioctl(vcpu, KVM_SET_SREGS, &s));
	CHECKED(ioctl(vcpu, KVM_SET_REGS, &regs));
}

/* Each vector that may come writes its number to port 0x20 and returns. */
static void set_handler(int vector, int at)
{
	const unsigned char out_iret[] = {0xb0, vector, 0xe6, 0x20, 0xcf}; /* mov al,vector; out 0x20,al; iret */

	memory[vector * 4] = at & 0xff;
	memory[vector * 4 + 1] = at >> 8;
	memcpy(memory + at, out_iret, sizeof out_iret);
}

/* Run until HLT, an error or the alarm; `vector`: KVM_INTERRUPT as soon as the guest can take one, 0 for none. */
static void go(int vector)
{
	for (int i = 0; i < 50; i++) {
		run->request_interrupt_window = vector != 0;
		int failed = ioctl(vcpu, KVM_RUN, 0) < 0 ? errno : 0;
		printf("exit_reason %d errno %d", failed ? -1 : (int)run->exit_reason, failed);
		if (!failed && run->exit_reason == KVM_EXIT_IO)
			printf(" port %#x value %#x", run->io.port, *((unsigned char *)run + run->io.data_offset));
		if (!failed && run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
			printf(" suberror %d", run->internal.suberror);
		puts("");
		if (failed || run->exit_reason == KVM_EXIT_INTERNAL_ERROR || run->exit_reason == KVM_EXIT_HLT)
			return;
		if (run->exit_reason == KVM_EXIT_MMIO && !run->mmio.is_write)
			memset(run->mmio.data, 7, sizeof run->mmio.data);
		if (vector && run->ready_for_interrupt_injection && run->if_flag) {
			struct kvm_interrupt request = {vector};
			CHECKED(ioctl(vcpu, KVM_INTERRUPT, &request));
			vector = 0;
		}
	}
}

#define READ_DEVICE 0xa0, AT & 0xff, AT >> 8 /* mov al,[AT]: the first one faults, KVM caches that it is MMIO */

/* INT 0x30 pushes to a device. */
static void int_to_device(void)
{
	static const unsigned char code[] = {READ_DEVICE, READ_DEVICE, 0xcd, 0x30, 0xf4};

	set_up(code, sizeof code, DEVICE, AT + 0x800);
	set_handler(0x30, 0x2000);
	go(0);
}

/* An external interrupt is delivered to a stack on a device. */
static void interrupt_to_device(void)
{
	static const unsigned char code[] = {READ_DEVICE, READ_DEVICE, 0xfb, 0x90, 0x90, 0x90, 0x90, 0xf4};

	set_up(code, sizeof code, DEVICE, AT + 0x800);
	set_handler(0x31, 0x2000);
	go(0x31);
}

/* ICEBP: #DB on every processor. */
static void icebp(void)
{
	static const unsigned char code[] = {0xf1, 0xf4};

	set_up(code, sizeof code, 0, STACK);
	set_handler(1, 0x2000);
	set_handler(6, 0x2010);
	go(0);
}

/* INT3, whose delivery faults on memory that was not touched; then two ordinary exits. */
static void int3_fresh_stack(void)
{
	static const unsigned char code[] = {0xcc, 0xe6, 0x10, 0xe6, 0x11, 0xf4};

	set_up(code, sizeof code, 0, FRESH + 0x800);
	set_handler(3, 0x2000);
	go(0);
}

/* As above with INT 0x30, then a device is read: an ordinary MMIO exit, with nothing being delivered. */
static void device_after_int(void)
{
	static const unsigned char code[] = {READ_DEVICE, 0xcd, 0x30, READ_DEVICE, READ_DEVICE, 0xf4};

	set_up(code, sizeof code, 0, FRESH + 0x800);
	set_handler(0x30, 0x2000);
	go(0);
}

/* A loop of some hundred million instructions with interrupts off. */
static void masked_loop(void)
{
	static const unsigned char code[] = {0xfa, 0x66, 0xb9, 0x00, 0x00, 0x00, 0x02, 0x66, 0x49, 0x75, 0xfc, 0xf4};

	set_up(code, sizeof code, 0, STACK);
	go(0);
}

static void ignore(int number) { (void)number; }

static const struct { const char *name; void (*start)(void); } modes[] = {
	{"int-to-device", int_to_device},     {"interrupt-to-device", interrupt_to_device}, {"icebp", icebp},
	{"int3-fresh-stack", int3_fresh_stack}, {"device-after-int", device_after_int},     {"masked-loop", masked_loop},
};

int main(int argc, char **argv)
{
	int ms = argc > 2 ? atoi(argv[2]) : 1000;
	struct itimerval once = {{0, 20000}, {ms / 1000, ms % 1000 * 1000}};
	struct sigaction action = {.sa_handler = ignore};

	for (unsigned i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(modes[i].name, argv[1])) {
			sigaction(SIGALRM, &action, NULL);
			setitimer(ITIMER_REAL, &once, NULL);
			modes[i].start();
			puts("ok");
			return 0;
		}
	return 3;
}
