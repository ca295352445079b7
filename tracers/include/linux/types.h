/*
 * bcc compiles every program against the running kernel's headers, which few hosts have. Ours use no kernel
 * structure: the fields of an event are found in the kernel's own format text. So the handful of types that
 * bcc's helpers.h wants is all that is needed, and these files are the "kernel source" bcc is shown.
 */
#ifndef KVMTRACE_TYPES_H
#define KVMTRACE_TYPES_H
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u16 __sum16;
typedef __u32 __wsum;
typedef _Bool bool;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
typedef int pid_t;
#define __aligned_u64 __u64 __attribute__((aligned(8)))
#define __always_inline inline __attribute__((always_inline))
#endif
