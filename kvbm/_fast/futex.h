/* SPDX-License-Identifier: Apache-2.0 */
/* Sleep on a doorbell in shared memory, always with a deadline: futex(2) between processes. */
#ifndef KVBM_FUTEX_H
#define KVBM_FUTEX_H

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "atomics.h"

/* Returns when the doorbell is no longer `seen`, somebody rings, or `timeout_ns` have passed. */
static inline void kv_doorbell_wait(kv_au32 *bell, uint32_t seen, uint64_t timeout_ns) {
    struct timespec timeout = {(time_t)(timeout_ns / 1000000000u),
                               (long)(timeout_ns % 1000000000u)};
    syscall(SYS_futex, kv_u32_address(bell), FUTEX_WAIT, seen, &timeout, NULL, 0);
}

static inline void kv_doorbell_ring(kv_au32 *bell) {
    kv_u32_fetch_add_release(bell, 1);
    syscall(SYS_futex, kv_u32_address(bell), FUTEX_WAKE, 1, NULL, NULL, 0);
}

#endif
