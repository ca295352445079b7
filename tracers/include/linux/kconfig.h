/* Stands in for the kernel's header of that name; see types.h. */
#define CONFIG_BPF_SYSCALL 1
