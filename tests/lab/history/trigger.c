/*
 * Guests that make historic faults of KVM happen, each with the small VMM it needs: `trigger MODE`.
 * Build: cc -static -O1 -o trigger trigger.c
 *
 * Memory is 1 MiB at 0. Unless a mode says otherwise, the guest runs in flat 32-bit protected mode without paging, with
 * a GDT (8: code, 16: data) and an IDT in memory. A guest ends with OUT to port 0xf4, whose AL is the exit status.
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
#include <unistd.h>

#define CHECKED(call) ({ long result = (call); if (result < 0) { perror(#call); exit(1); } result; })

enum {
	GDT = 0x800, IDT = 0x1000, STUBS = 0x2000, CODE = 0x4000, STACK = 0x9000, DATA = 0xa000,
	DIRECTORY = 0xc000, TABLE = 0xd000, LONG_TABLES = 0x10000, VMCB = 0x21000, BITMAPS = 0x22000, AREA = 0x28000,
	SMRAM = 0x38000, MEMORY = 0x100000,
};

/* A guest's code lies between two labels; its handlers have labels of their own. */
#define GUEST(name, text) \
	extern const unsigned char guest_##name[], guest_##name##_end[]; \
	asm(".pushsection .rodata\n.code32\n.globl guest_" #name "\nguest_" #name ":\n" text \
	    "\n.globl guest_" #name "_end\nguest_" #name "_end:\n.code64\n.popsection\n");
#define LABEL(name) extern const unsigned char name[];
#define END "mov $0, %al\n out %al, $0xf4\n"

#define LONG 2
#define HIGH 0x100000000ul

static int kvm, vm, vcpu;
static struct kvm_run *run;
static unsigned char *memory;
static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[200]; } cpuid;

struct mode {
	const char *name;
	const unsigned char *code, *end;
	int irqchip;        /* interrupt controllers in the kernel */
	int real;           /* 16-bit real mode */
	int paging;         /* identity map of the first MiB, the page at 0x80000 absent; LONG: in long mode, above 4 GiB */
	void (*prepare)(void);
	void (*serve)(int port); /* a port written by the guest */
};

/* An entry of the IDT for an exception or interrupt; `label` lies in the guest's code. */
static const struct mode *mode;

static void set_gate(int vector, const unsigned char *label)
{
	unsigned at = CODE + (label - mode->code);
	unsigned *gate = (unsigned *)(memory + IDT + vector * 8);

	gate[0] = 8 << 16 | (at & 0xffff);
	gate[1] = (at & 0xffff0000) | 0x8e00;
}

/* ---------------------------------------------------------------- guests */

/* x2APIC: ICR written, SELF_IPI written, ICR read back; then three values with reserved bits */
GUEST(x2apic,
	"mov $0x1b, %ecx\n rdmsr\n or $0xc00, %eax\n wrmsr\n"
	"mov $0x80f, %ecx\n mov $0x1ff, %eax\n xor %edx, %edx\n wrmsr\n"
	"mov $4, %ebx\n"
	"1: sti\n"
	"mov $0x830, %ecx\n mov $0x32, %eax\n xor %edx, %edx\n wrmsr\n nop\n"
	"mov $0x83f, %ecx\n mov $0x31, %eax\n xor %edx, %edx\n wrmsr\n nop\n"
	"mov $0x830, %ecx\n rdmsr\n"
	"cli\n"
	"mov $0x808, %ecx\n xor %eax, %eax\n mov $1, %edx\n wrmsr\n"
	"mov $0x830, %ecx\n mov $0x2032, %eax\n xor %edx, %edx\n wrmsr\n"
	"mov $0x83f, %ecx\n mov $0x131, %eax\n xor %edx, %edx\n wrmsr\n"
	"dec %ebx\n jnz 1b\n" END
	"x2apic_irq: push %eax\n push %ecx\n push %edx\n"
	"mov $0x80b, %ecx\n xor %eax, %eax\n xor %edx, %edx\n wrmsr\n"
	"pop %edx\n pop %ecx\n pop %eax\n iret\n"
	"x2apic_gp: add $4, %esp\n addl $2, (%esp)\n iret\n")
LABEL(x2apic_irq)
LABEL(x2apic_gp)
static void prepare_x2apic(void)
{
	set_gate(0x31, x2apic_irq);
	set_gate(0x32, x2apic_irq);
	set_gate(13, x2apic_gp);
}

/* a hypercall of Hyper-V in real mode: #UD */
GUEST(hyper_v_ud,
	".code16\n"
	"mov $0x40000000, %ecx\n mov $1, %eax\n xor %edx, %edx\n wrmsr\n"
	"mov $5, %bp\n"
	"1: vmmcall\n nop\n dec %bp\n jnz 1b\n" END
	"hyper_v_ud_handler: push %bp\n mov %sp, %bp\n addw $3, 2(%bp)\n pop %bp\n iret\n.code32\n")
LABEL(hyper_v_ud_handler)
static void prepare_hyper_v(void)
{
	*(unsigned short *)(memory + 6 * 4) = CODE + (hyper_v_ud_handler - mode->code);
	*(unsigned short *)(memory + 6 * 4 + 2) = 0;
	for (unsigned i = 0; i < cpuid.head.nent; i++)
		if (cpuid.entries[i].function == 0x40000001)
			cpuid.entries[i].eax = 0x31237648; /* "Hv#1" */
}

/* REP INS to a page that is absent, single-stepped by the guest; the handler gives another address */
GUEST(ins_fault,
	"mov $5, %ebx\n"
	"1: mov $0x80000, %edi\n mov $1, %ecx\n mov $0x10, %edx\n cld\n"
	"pushf\n orl $0x100, (%esp)\n popf\n rep insb\n nop\n nop\n nop\n"
	"dec %ebx\n jnz 1b\n" END
	"ins_fault_handler: add $4, %esp\n mov $0xa000, %edi\n iret\n"
	"ins_fault_db: andl $~0x100, 8(%esp)\n iret\n")
LABEL(ins_fault_handler)
LABEL(ins_fault_db)
static void prepare_ins(void)
{
	set_gate(14, ins_fault_handler);
	set_gate(1, ins_fault_db);
}

/* the I/O APIC's pin 20: a level interrupt ended by making the entry edge-triggered for a moment */
GUEST(ioapic_edge,
	"movl $0x1ff, 0xfee000f0\n"
	"movl $0x39, 0xfec00000\n movl $0, 0xfec00010\n"
	"movl $0x38, 0xfec00000\n movl $0x8040, 0xfec00010\n"
	"mov $3, %ebx\n"
	"1: xor %esi, %esi\n out %al, $0x10\n sti\n" /* the VMM raises the line */
	"mov $40, %ecx\n"
	"2: in $0x12, %al\n test %esi, %esi\n jnz 3f\n loop 2b\n"
	"cli\n mov $1, %al\n out %al, $0xf4\n"
	"3: cli\n dec %ebx\n jnz 1b\n" END
	"ioapic_irq: inc %esi\n out %al, $0x11\n" /* the VMM lowers it */
	"movl $0x38, 0xfec00000\n movl $0x10040, 0xfec00010\n"
	"movl $0, 0xfee000b0\n"
	"movl $0x38, 0xfec00000\n movl $0x8040, 0xfec00010\n iret\n")
LABEL(ioapic_irq)
static void prepare_ioapic(void) { set_gate(0x40, ioapic_irq); }
static void serve_line(int port)
{
	struct kvm_irq_level line = {.irq = 20, .level = port == 0x10};

	if (port == 0x10 || port == 0x11)
		CHECKED(ioctl(vm, KVM_IRQ_LINE, &line));
}

/* instructions behind the prefix that forces their emulation (kvm.force_emulation_prefix=1) */
#define FORCED "ud2\n .ascii \"kvm\"\n"
GUEST(clflushopt,
	"mov $0xa000, %eax\n mov $5, %ebx\n"
	"1: " FORCED ".byte 0x66, 0x0f, 0xae, 0x38\n dec %ebx\n jnz 1b\n" END
	"clflushopt_ud: addl $4, (%esp)\n iret\n")
LABEL(clflushopt_ud)
static void prepare_clflushopt(void) { set_gate(6, clflushopt_ud); }

GUEST(rdpid,
	"mov $5, %ebx\n"
	"1: " FORCED ".byte 0xf3, 0x0f, 0xc7, 0xf8\n dec %ebx\n jnz 1b\n" END
	"rdpid_ud: addl $4, (%esp)\n iret\n"
	"rdpid_gp: add $4, %esp\n addl $4, (%esp)\n iret\n")
LABEL(rdpid_ud)
LABEL(rdpid_gp)
static void prepare_rdpid(void)
{
	set_gate(6, rdpid_ud);
	set_gate(13, rdpid_gp);
	for (unsigned i = 0; i < cpuid.head.nent; i++) {
		if (cpuid.entries[i].function == 7 && !cpuid.entries[i].index)
			cpuid.entries[i].ecx &= ~(1u << 22);
		if (cpuid.entries[i].function == 0x80000001)
			cpuid.entries[i].edx &= ~(1u << 27);
	}
}

GUEST(fep_out, "mov $5, %ebx\n 1: " FORCED "out %al, $0x10\n dec %ebx\n jnz 1b\n" END)

/* an SMI whose handler triple-faults */
GUEST(smm_shutdown, "1: out %al, $0x10\n jmp 1b\n")
static void prepare_smm(void)
{
	static const unsigned char handler[] = {
		0x66, 0x2e, 0x0f, 0x01, 0x1e, 0x20, 0x80, /* lidt cs:[0x8020]: no entries */
		0xcc,                                     /* int3 */
	};
	memcpy(memory + SMRAM, handler, sizeof handler);
}
static int outs;
static void serve_smi(int port)
{
	if (port == 0x10 && ++outs == 3)
		CHECKED(ioctl(vcpu, KVM_SMI, 0));
}

/* an SMI above 4 GiB, whose handler returns at once */
GUEST(rsm_high, ".code64\n mov $9, %ebx\n 1: out %al, $0x10\n dec %ebx\n jnz 1b\n" END ".code32\n")
/* The first 2 MiB as they are, at 0 and at 4 GiB. */
static void make_long_tables(void)
{
	unsigned long *tables = (unsigned long *)(memory + LONG_TABLES);

	tables[0] = (LONG_TABLES + 0x1000) | 7;
	tables[512] = tables[512 + 4] = (LONG_TABLES + 0x2000) | 7;
	tables[1024] = 0x87;
}
static void prepare_rsm(void)
{
	memcpy(memory + SMRAM, "\x0f\xaa", 2); /* rsm */
	make_long_tables();
}

GUEST(invlpga,
	"mov $5, %ebx\n mov $0xa000, %eax\n xor %ecx, %ecx\n"
	"1: invlpga %eax, %ecx\n nop\n dec %ebx\n jnz 1b\n" END
	"invlpga_ud: addl $3, (%esp)\n iret\n")
LABEL(invlpga_ud)
static void prepare_invlpga(void) { set_gate(6, invlpga_ud); }

/* a one-shot timer that ran out before it was restored */
GUEST(timer_restore, "sti\n 1: hlt\n jmp 1b\n" "timer_irq: " END)
LABEL(timer_irq)
static void prepare_timer(void)
{
	struct kvm_lapic_state state;

	set_gate(0x50, timer_irq);
	CHECKED(ioctl(vcpu, KVM_GET_LAPIC, &state));
	*(unsigned *)(state.regs + 0xf0) = 0x1ff;       /* on */
	*(unsigned *)(state.regs + 0x320) = 0x50;       /* one-shot */
	*(unsigned *)(state.regs + 0x3e0) = 0xb;        /* divide by 1 */
	*(unsigned *)(state.regs + 0x380) = 1500000000; /* 1.5 s */
	*(unsigned *)(state.regs + 0x390) = 0;          /* none of it left */
	CHECKED(ioctl(vcpu, KVM_SET_LAPIC, &state));
}

/* ---------------------------------------------------------------- a hypervisor as guest, AMD */

#define SVM_ON "mov $0xc0000080, %ecx\n rdmsr\n or $0x1000, %eax\n wrmsr\n" \
	"mov $0xc0010117, %ecx\n mov $0x20000, %eax\n xor %edx, %edx\n wrmsr\n"
#define ENTER "mov $0x21000, %eax\n vmrun %eax\n"

GUEST(nested_bad_vmcb,
	SVM_ON "mov $5, %ebx\n"
	"1: mov $0x80000000, %eax\n vmrun %eax\n nop\n dec %ebx\n jnz 1b\n" END
	"bad_vmcb_gp: add $4, %esp\n addl $3, (%esp)\n iret\n")
LABEL(bad_vmcb_gp)
GUEST(nested_vmload,
	SVM_ON "mov $5, %ebx\n 1: " ENTER "addl $0, 0xa000\n dec %ebx\n jnz 1b\n" END
	"vmload_l2: mov $0x29000, %eax\n vmload %eax\n vmmcall\n jmp vmload_l2\n")
LABEL(vmload_l2)
GUEST(nested_lmsw,
	SVM_ON "mov $5, %ebx\n 1: " ENTER "dec %ebx\n jnz 1b\n" END
	"lmsw_l2: smsw %eax\n xor $2, %eax\n " FORCED "lmsw %ax\n vmmcall\n jmp lmsw_l2\n")
LABEL(lmsw_l2)
GUEST(nested_bad_state,
	SVM_ON "mov $5, %ebx\n 1: " ENTER "dec %ebx\n jnz 1b\n" END
	"bad_state_l2: vmmcall\n jmp bad_state_l2\n")
LABEL(bad_state_l2)

/* an interrupt that L1 injects meets a gate that is not present: L1 gets the #NP, and what was being delivered */
GUEST(nested_delivery,
	SVM_ON "mov $5, %ebx\n 1: movl $0x80000020, 0x210a8\n" ENTER "dec %ebx\n jnz 1b\n" END
	"delivery_l2: nop\n jmp delivery_l2\n")
LABEL(delivery_l2)

static void set_segment(unsigned at, unsigned short selector, unsigned short attributes)
{
	*(unsigned short *)(memory + VMCB + 0x400 + at) = selector;
	*(unsigned short *)(memory + VMCB + 0x400 + at + 2) = attributes;
	*(unsigned *)(memory + VMCB + 0x400 + at + 4) = 0xffffffff;
}

/* A VMCB for L2, which runs as L1 does: flat, 32-bit, without paging; VMRUN and VMMCALL are intercepted. */
static void make_vmcb(const unsigned char *l2)
{
	unsigned char *control = memory + VMCB, *save = control + 0x400;

	*(unsigned *)(control + 0x10) = 3;
	*(unsigned long *)(control + 0x40) = BITMAPS;
	*(unsigned long *)(control + 0x48) = BITMAPS + 0x3000;
	*(unsigned *)(control + 0x58) = 1;
	for (unsigned at = 0; at < 0x60; at += 0x10)
		set_segment(at, at == 0x10 ? 8 : 16, at == 0x10 ? 0xc9b : 0xc93);
	*(unsigned *)(save + 0x84) = 0x7ff; /* IDT */
	*(unsigned long *)(save + 0x88) = IDT;
	*(unsigned *)(save + 0x64) = 0x1f;
	*(unsigned long *)(save + 0x68) = GDT;
	set_segment(0x90, 0, 0x8b);
	*(unsigned long *)(save + 0xd0) = 0x1000; /* EFER.SVME */
	*(unsigned long *)(save + 0x158) = 0x11;
	*(unsigned long *)(save + 0x160) = 0x400;
	*(unsigned long *)(save + 0x168) = 0xffff0ff0;
	*(unsigned long *)(save + 0x170) = 2;
	*(unsigned long *)(save + 0x178) = CODE + (l2 - mode->code);
	*(unsigned long *)(save + 0x1d8) = STACK - 0x800;
}
static void prepare_bad_vmcb(void) { set_gate(13, bad_vmcb_gp); }
/* In long mode: elsewhere VMLOAD exits whatever is intercepted (APM, "VMSAVE and VMLOAD Virtualization"). */
static void prepare_vmload(void)
{
	unsigned char *save = memory + VMCB + 0x400;

	make_vmcb(vmload_l2);
	set_segment(0x10, 8, 0xa9b);
	make_long_tables();
	*(unsigned long *)(save + 0xd0) = 0x1500; /* SVME, LMA, LME */
	*(unsigned long *)(save + 0x148) = 0x20;  /* CR4.PAE */
	*(unsigned long *)(save + 0x150) = LONG_TABLES;
	*(unsigned long *)(save + 0x158) = 0x80000011;
}
static void prepare_lmsw(void)
{
	make_vmcb(lmsw_l2);
	*(unsigned *)(memory + VMCB + 0xc) = 1u << 5; /* selective writes of CR0 */
}
static void prepare_bad_state(void)
{
	make_vmcb(bad_state_l2);
	*(unsigned long *)(memory + VMCB + 0x400 + 0x158) = 0x20000011; /* CR0.NW without CD */
}

static void prepare_delivery(void)
{
	make_vmcb(delivery_l2);
	*(unsigned *)(memory + VMCB + 8) = 1u << 11; /* #NP */
	*(unsigned *)(memory + IDT + 0x20 * 8) = 8 << 16;
	*(unsigned *)(memory + IDT + 0x20 * 8 + 4) = 0xe00;
}

/* ---------------------------------------------------------------- Intel */

/* #DB in the shadow of MOV SS while single-stepping: an access of a debug register with DR7.GD set */
GUEST(mov_ss_tf,
	"mov $4, %ebx\n"
	"1: mov $0x2400, %eax\n mov %eax, %dr7\n mov $16, %ecx\n"
	"pushf\n orl $0x100, (%esp)\n popf\n"
	"mov %ecx, %ss\n mov %dr6, %eax\n nop\n"
	"dec %ebx\n jnz 1b\n" END
	"mov_ss_db: push %eax\n mov $0x400, %eax\n mov %eax, %dr7\n pop %eax\n"
	"andl $~0x100, 8(%esp)\n iret\n")
LABEL(mov_ss_db)
static void prepare_mov_ss(void) { set_gate(1, mov_ss_db); }

#define VMX_ON "mov $0x480, %ecx\n rdmsr\n mov %eax, 0x28000\n mov %eax, 0x29000\n" \
	"movl $0x28000, 0xa000\n movl $0, 0xa004\n movl $0x29000, 0xa008\n movl $0, 0xa00c\n" \
	"mov %cr4, %eax\n or $0x2000, %eax\n mov %eax, %cr4\n"
GUEST(vmread_fault,
	VMX_ON "vmxon 0xa000\n vmclear 0xa008\n vmptrld 0xa008\n"
	"mov $4, %ebx\n"
	"1: mov $0x80000, %edi\n mov $0x4402, %ecx\n vmread %ecx, (%edi)\n nop\n nop\n dec %ebx\n jnz 1b\n" END
	"vmread_pf: add $4, %esp\n mov $0xa010, %edi\n iret\n")
LABEL(vmread_pf)
static void set_feature_control(void)
{
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } msrs = {{.nmsrs = 1}, {0x3a, 0, 5}};

	CHECKED(ioctl(vcpu, KVM_SET_MSRS, &msrs));
}
static void prepare_vmread(void) { set_gate(14, vmread_pf); }

/* VMXON with CR0.NE clear */
GUEST(vmxon_gp,
	VMX_ON "mov %cr0, %eax\n and $~0x20, %eax\n mov %eax, %cr0\n mov $4, %ebx\n"
	"1: mov $0xa000, %esi\n vmxon (%esi)\n nop\n dec %ebx\n jnz 1b\n" END
	"vmxon_gp_handler: add $4, %esp\n"
	"vmxon_ud_handler: addl $4, (%esp)\n iret\n")
LABEL(vmxon_gp_handler)
LABEL(vmxon_ud_handler)
static void prepare_vmxon(void)
{
	set_gate(13, vmxon_gp_handler);
	set_gate(6, vmxon_ud_handler);
}

/* CR0 with PG and without PE: KVM_SET_SREGS must refuse it */
GUEST(sregs_cr0, "mov $5, %ebx\n 1: cpuid\n mov $5, %ebx\n out %al, $0x10\n" END)
static void serve_nothing(int port) { (void)port; }
static void bad_sregs(void)
{
	struct kvm_sregs sregs;

	CHECKED(ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cr0 = (sregs.cr0 & ~1ul) | 0x80000000;
	sregs.cr3 = DIRECTORY;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0)
		printf("KVM_SET_SREGS: %s\n", strerror(errno));
}

/* ---------------------------------------------------------------- the VMM */

#define CODE_OF(name) guest_##name, guest_##name##_end
static const struct mode modes[] = {
	{"x2apic", CODE_OF(x2apic), 1, 0, 0, prepare_x2apic, 0},
	{"hyper-v-ud", CODE_OF(hyper_v_ud), 1, 1, 0, prepare_hyper_v, 0},
	{"ins-fault", CODE_OF(ins_fault), 0, 0, 1, prepare_ins, 0},
	{"ioapic-edge", CODE_OF(ioapic_edge), 1, 0, 0, prepare_ioapic, serve_line},
	{"clflushopt", CODE_OF(clflushopt), 0, 0, 0, prepare_clflushopt, 0},
	{"rdpid", CODE_OF(rdpid), 0, 0, 0, prepare_rdpid, 0},
	{"fep-out", CODE_OF(fep_out), 0, 0, 0, 0, 0},
	{"smm-shutdown", CODE_OF(smm_shutdown), 1, 0, 0, prepare_smm, serve_smi},
	{"rsm-high", CODE_OF(rsm_high), 1, 0, LONG, prepare_rsm, serve_smi},
	{"invlpga", CODE_OF(invlpga), 0, 0, 0, prepare_invlpga, 0},
	{"timer-restore", CODE_OF(timer_restore), 1, 0, 0, prepare_timer, 0},
	{"nested-bad-vmcb", CODE_OF(nested_bad_vmcb), 0, 0, 1, prepare_bad_vmcb, 0},
	{"nested-vmload", CODE_OF(nested_vmload), 0, 0, 1, prepare_vmload, 0},
	{"nested-lmsw", CODE_OF(nested_lmsw), 0, 0, 1, prepare_lmsw, 0},
	{"nested-bad-state", CODE_OF(nested_bad_state), 0, 0, 1, prepare_bad_state, 0},
	{"nested-delivery", CODE_OF(nested_delivery), 0, 0, 1, prepare_delivery, 0},
	{"mov-ss-tf", CODE_OF(mov_ss_tf), 0, 0, 0, prepare_mov_ss, 0},
	{"vmread-fault", CODE_OF(vmread_fault), 0, 0, 1, prepare_vmread, 0},
	{"vmxon-gp", CODE_OF(vmxon_gp), 0, 0, 0, prepare_vmxon, 0},
	{"sregs-cr0", CODE_OF(sregs_cr0), 0, 0, 0, 0, serve_nothing},
};

static void map_memory(void)
{

	memory = mmap(0, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {0, 0, 0, MEMORY, (unsigned long)memory};
	CHECKED(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	if (mode->serve == serve_smi) {
		region.slot = 1 << 16; /* the same memory within system-management mode */
		CHECKED(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	}
	memcpy(memory + CODE, mode->code, mode->end - mode->code);
	((unsigned long *)(memory + GDT))[1] = 0x00cf9b000000ffff;
	((unsigned long *)(memory + GDT))[2] = 0x00cf93000000ffff;
	for (int vector = 0; vector < 256; vector++) { /* an exception nobody expects ends the guest: its vector is the status */
		unsigned char *stub = memory + STUBS + vector * 16;
		unsigned *gate = (unsigned *)(memory + IDT + vector * 8);
		memcpy(stub, (unsigned char[]){0xb0, vector | 0x80, 0xe6, 0xf4}, 4);
		gate[0] = 8 << 16 | (STUBS + vector * 16);
		gate[1] = 0x8e00;
	}
	*(unsigned *)(memory + DIRECTORY) = TABLE | 7;
	for (unsigned page = 0; page < MEMORY >> 12; page++)
		((unsigned *)(memory + TABLE))[page] = page == 0x80 ? 0 : page << 12 | 7;
}

static void set_state(void)
{
	struct kvm_segment code = {.limit = ~0u, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1};
	struct kvm_segment data = {.limit = ~0u, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};
	struct kvm_sregs s;

	CHECKED(ioctl(vcpu, KVM_GET_SREGS, &s));
	if (mode->real) {
		s.cs.base = s.cs.selector = 0;
	} else {
		s.cs = code;
		s.ds = s.es = s.fs = s.gs = s.ss = data;
		s.cr0 = 0x31; /* PE, ET, NE */
		s.gdt.base = GDT;
		s.gdt.limit = 0x1f;
		s.idt.base = IDT;
		s.idt.limit = 0x7ff;
	}
	if (mode->paging) {
		s.cr3 = DIRECTORY;
		s.cr0 |= 0x80000000;
	}
	if (mode->paging == LONG) {
		s.cr3 = LONG_TABLES;
		s.cr4 |= 0x20;   /* PAE */
		s.efer |= 0x500; /* LME, LMA */
		s.cs.l = 1;
		s.cs.db = 0;
		regs.rip += HIGH;
	}
	CHECKED(ioctl(vcpu, KVM_SET_SREGS, &s));
	CHECKED(ioctl(vcpu, KVM_SET_REGS, &regs));
}

static void make_vm(void)
{
	vm = CHECKED(ioctl(kvm, KVM_CREATE_VM, 0));
	CHECKED(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
	if (mode->irqchip)
		CHECKED(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
	map_memory();
	vcpu = CHECKED(ioctl(vm, KVM_CREATE_VCPU, 0));
	run = mmap(0, CHECKED(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	cpuid.head.nent = 200;
	CHECKED(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	if (mode->prepare)
		mode->prepare();
	CHECKED(ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
	set_state();
	if (mode->prepare == prepare_vmread || mode->prepare == prepare_vmxon)
		set_feature_control();
	if (mode->serve == serve_nothing)
		bad_sregs();
}

static void serve_io(void)
{
	unsigned char *data = (unsigned char *)run + run->io.data_offset;

	if (run->io.direction == KVM_EXIT_IO_IN) {
		memset(data, 0x42, run->io.size * run->io.count);
		return;
	}
	if (run->io.port == 0xf4) {
		printf("guest's status %#x\n", *data);
		exit(*data ? 3 : 0);
	}
	if (mode->serve)
		mode->serve(run->io.port);
}

int main(int argc, char **argv)
{
	for (unsigned i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(modes[i].name, argv[1]))
			mode = &modes[i];
	if (!mode)
		return 2;
	alarm(20); /* a guest that gets nowhere ends */
	kvm = CHECKED(open("/dev/kvm", O_RDWR));
	make_vm();
	for (int i = 0; i < 2000; i++) {
		CHECKED(ioctl(vcpu, KVM_RUN, 0));
		if (run->exit_reason == KVM_EXIT_IO) {
			serve_io();
		} else if (run->exit_reason != KVM_EXIT_MMIO) {
			printf("exit reason %d, %#llx\n", run->exit_reason, (unsigned long long)run->hw.hardware_exit_reason);
			return 4;
		}
	}
	return 5;
}
