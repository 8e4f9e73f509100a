# SPDX-License-Identifier: Apache-2.0
# Declarations of atomics.h: opaque words, the memory order in each function's name.
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "atomics.h" nogil:
    ctypedef struct kv_au64:
        pass
    ctypedef struct kv_au32:
        pass

    void kv_prefetch(const void *p) noexcept
    uint32_t kv_u32_once(const uint32_t *p) noexcept
    uint64_t kv_u64_load_relaxed(const kv_au64 *p) noexcept
    uint64_t kv_u64_load_acquire(const kv_au64 *p) noexcept
    uint64_t kv_u64_load_seq_cst(const kv_au64 *p) noexcept
    uint32_t kv_u32_load_relaxed(const kv_au32 *p) noexcept
    uint32_t kv_u32_load_acquire(const kv_au32 *p) noexcept
    uint32_t kv_u32_load_seq_cst(const kv_au32 *p) noexcept

    void kv_u64_store_relaxed(kv_au64 *p, uint64_t v) noexcept
    void kv_u64_store_release(kv_au64 *p, uint64_t v) noexcept
    void kv_u32_store_relaxed(kv_au32 *p, uint32_t v) noexcept
    void kv_u32_store_release(kv_au32 *p, uint32_t v) noexcept
    void kv_u32_store_seq_cst(kv_au32 *p, uint32_t v) noexcept

    bint kv_u64_cas_acq_rel(kv_au64 *p, uint64_t *expected, uint64_t desired) noexcept
    void kv_u64_tally(kv_au64 *p, uint64_t more) noexcept
    uint64_t kv_u64_fetch_add_relaxed(kv_au64 *p, uint64_t v) noexcept
    uint32_t kv_u32_fetch_add_release(kv_au32 *p, uint32_t v) noexcept
    uint64_t kv_u64_fetch_or_acq_rel(kv_au64 *p, uint64_t v) noexcept
    uint64_t kv_u64_fetch_and_acq_rel(kv_au64 *p, uint64_t v) noexcept

    void kv_cpu_pause() noexcept
    uint32_t *kv_u32_address(kv_au32 *p) noexcept
