/* Stands in for the kernel's header of that name; see types.h. bcc asks for nothing newer. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 8, 0)
