/* What gcc's -fsanitize-coverage=trace-pc calls at the beginning of every basic block: notes which were reached, and
 * from which. Read by tests/fuzz/reached.py. */
#include <stdint.h>

#define N_SLOTS (1u << 16)

__attribute__((visibility("default"))) uint8_t kvmtrace_blocks[N_SLOTS];
__attribute__((visibility("default"))) uint8_t kvmtrace_edges[N_SLOTS];

static _Thread_local uint32_t before;

void __sanitizer_cov_trace_pc(void);

/* the library may be loaded anywhere: places are counted from this function */
__attribute__((no_sanitize_coverage, no_sanitize_address, no_sanitize_undefined)) void __sanitizer_cov_trace_pc(void) {
    uint32_t place = (uint32_t)((uintptr_t)__builtin_return_address(0) - (uintptr_t)&__sanitizer_cov_trace_pc);
    kvmtrace_blocks[place % N_SLOTS] = 1;
    kvmtrace_edges[(place * 31 + before) % N_SLOTS] = 1;
    before = place * 17;
}
