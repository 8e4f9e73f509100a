/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The only file that names a memory order.
 *
 * The types are opaque, so a plain read or write of shared state does not compile, and the order is
 * part of each function's name, so that a reader of the protocol sees it where it matters. Storage
 * is plain memory accessed through the compiler's atomic builtins: lock-free and address-free,
 * which two processes that map the segment at different addresses need.
 *
 * A build with KVBM_DEBUG counts every store to shared memory (kv_shared_store). A test sets the
 * countdown and the process ends at exactly that store, or stops there until it is continued, so
 * that a crash or a stop between any two shared stores can be visited.
 */
#ifndef KVBM_ATOMICS_H
#define KVBM_ATOMICS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct { _Alignas(8) uint64_t _v; } kv_au64;
typedef struct { _Alignas(4) uint32_t _v; } kv_au32;

_Static_assert(sizeof(kv_au64) == 8 && sizeof(kv_au32) == 4, "atomics carry no padding");
_Static_assert(__atomic_always_lock_free(8, 0),
               "64-bit atomics must be lock-free across processes");
_Static_assert(__atomic_always_lock_free(4, 0),
               "32-bit atomics must be lock-free across processes");

#ifdef KVBM_DEBUG
#include <signal.h>
#include <unistd.h>
/* One counter for all extension modules of a process: crash tests load them with RTLD_GLOBAL. */
__attribute__((weak, visibility("default"))) uint64_t kv_crash_countdown = 0;
__attribute__((weak, visibility("default"))) uint64_t kv_crash_is_a_stop = 0;
__attribute__((weak, visibility("default"))) uint64_t kv_shared_store_count = 0;
static inline void kv_shared_store(void) {
    __atomic_fetch_add(&kv_shared_store_count, 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&kv_crash_countdown, __ATOMIC_RELAXED) != 0 &&
        __atomic_fetch_sub(&kv_crash_countdown, 1, __ATOMIC_RELAXED) == 1) {
        if (kv_crash_is_a_stop)
            raise(SIGSTOP); /* to this thread: it goes no further, and the others stop with it */
        else
            _exit(86);
    }
}
#else
static inline void kv_shared_store(void) {}
#endif

/* A module that is built with KVBM_PLANT_RACE releases nothing. For one test: the race detector has
 * to notice it (tests/stress/test_races.py). */
#ifdef KVBM_PLANT_RACE
#define KV_RELEASE __ATOMIC_RELAXED
#define KV_ACQ_REL __ATOMIC_ACQUIRE
#else
#define KV_RELEASE __ATOMIC_RELEASE
#define KV_ACQ_REL __ATOMIC_ACQ_REL
#endif

/* One read of a field that another word orders: what was checked is what is used, also when
 * somebody scribbles on it meanwhile. */
static inline uint32_t kv_u32_once(const uint32_t *p) {
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
static inline uint64_t kv_u64_load_relaxed(const kv_au64 *p) {
    return __atomic_load_n(&p->_v, __ATOMIC_RELAXED);
}
static inline uint64_t kv_u64_load_acquire(const kv_au64 *p) {
    return __atomic_load_n(&p->_v, __ATOMIC_ACQUIRE);
}
static inline uint64_t kv_u64_load_seq_cst(const kv_au64 *p) {
    return __atomic_load_n(&p->_v, __ATOMIC_SEQ_CST);
}
static inline uint32_t kv_u32_load_relaxed(const kv_au32 *p) {
    return __atomic_load_n(&p->_v, __ATOMIC_RELAXED);
}
static inline uint32_t kv_u32_load_acquire(const kv_au32 *p) {
    return __atomic_load_n(&p->_v, __ATOMIC_ACQUIRE);
}
static inline uint32_t kv_u32_load_seq_cst(const kv_au32 *p) {
    return __atomic_load_n(&p->_v, __ATOMIC_SEQ_CST);
}

static inline void kv_u64_store_relaxed(kv_au64 *p, uint64_t v) {
    kv_shared_store();
    __atomic_store_n(&p->_v, v, __ATOMIC_RELAXED);
}
static inline void kv_u64_store_release(kv_au64 *p, uint64_t v) {
    kv_shared_store();
    __atomic_store_n(&p->_v, v, KV_RELEASE);
}
static inline void kv_u32_store_relaxed(kv_au32 *p, uint32_t v) {
    kv_shared_store();
    __atomic_store_n(&p->_v, v, __ATOMIC_RELAXED);
}
static inline void kv_u32_store_release(kv_au32 *p, uint32_t v) {
    kv_shared_store();
    __atomic_store_n(&p->_v, v, KV_RELEASE);
}
static inline void kv_u32_store_seq_cst(kv_au32 *p, uint32_t v) {
    kv_shared_store();
    __atomic_store_n(&p->_v, v, __ATOMIC_SEQ_CST);
}

/* Compare and swap: on failure *expected is refreshed (acquire): the caller decides again. */
static inline bool kv_u64_cas_acq_rel(kv_au64 *p, uint64_t *expected, uint64_t desired) {
    kv_shared_store();
    return __atomic_compare_exchange_n(&p->_v, expected, desired, false, KV_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

/* A number that one thread counts and others look at. */
static inline void kv_u64_tally(kv_au64 *p, uint64_t more) {
    __atomic_store_n(&p->_v, __atomic_load_n(&p->_v, __ATOMIC_RELAXED) + more, __ATOMIC_RELAXED);
}
static inline uint64_t kv_u64_fetch_add_relaxed(kv_au64 *p, uint64_t v) {
    kv_shared_store();
    return __atomic_fetch_add(&p->_v, v, __ATOMIC_RELAXED);
}
static inline uint32_t kv_u32_fetch_add_release(kv_au32 *p, uint32_t v) {
    kv_shared_store();
    return __atomic_fetch_add(&p->_v, v, KV_RELEASE);
}
static inline uint64_t kv_u64_fetch_or_acq_rel(kv_au64 *p, uint64_t v) {
    kv_shared_store();
    return __atomic_fetch_or(&p->_v, v, KV_ACQ_REL);
}
static inline uint64_t kv_u64_fetch_and_acq_rel(kv_au64 *p, uint64_t v) {
    kv_shared_store();
    return __atomic_fetch_and(&p->_v, v, KV_ACQ_REL);
}

static inline void kv_cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* A line that will be changed soon; no access, so it orders nothing and cannot race. */
static inline void kv_prefetch(const void *p) { __builtin_prefetch(p, 1); }

/* The address of a doorbell, for the kernel's futex call alone (futex.h). */
static inline uint32_t *kv_u32_address(kv_au32 *p) { return &p->_v; }

#endif
