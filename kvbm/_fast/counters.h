/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A part of layout.h, which says where these records are: what each process counts, on lines of its
 * own in the segment.
 *
 * Nothing here is ever set back: a line goes on with what its owners before counted, so that the
 * sum over all lines is that of the segment's life. All of it is relaxed; what a count tells of may
 * be seen a moment before or after it.
 */
#ifndef KVBM_COUNTERS_H
#define KVBM_COUNTERS_H

#include <stdint.h>

#include "atomics.h"

enum {
    KV_COUNTERS = 48,
    KV_LATENCY_BUCKETS = 24,
    KV_LATENCY_FIRST_NS = 4000,   /* upper bound of the first bucket; that of the next: twice it */
    KV_LATENCY_KINDS = 4,         /* store, load, spill, fetch: kv_operation_kind - 1 */
    KV_HISTOGRAMS = 2 * KV_LATENCY_KINDS /* of a worker: for each kind, one of each kv_latency */
};

typedef enum {
    KV_C_LOOKUPS, KV_C_LOOKUP_BLOCKS, KV_C_MATCHED_BLOCKS, KV_C_RESERVED, KV_C_PUBLISHED,
    KV_C_EVICTED, KV_C_ABANDONED, KV_C_DEDUPLICATED, KV_C_STORES, KV_C_LOADS, KV_C_STORES_FAILED,
    KV_C_LOADS_FAILED, KV_C_BLOCKS_STORED, KV_C_BLOCKS_LOADED, KV_C_BYTES_STORED,
    KV_C_BYTES_LOADED, KV_C_STORE_NS, KV_C_LOAD_NS, KV_C_SKIPPED_NO_SLOT,
    KV_C_SKIPPED_NO_OPERATION, KV_C_DECLINED, KV_C_INDEX_FULL, KV_C_STALE_ENTRIES,
    KV_C_CHECK_FAILURES, KV_C_RECOVERIES, KV_C_MATCHED_TOKENS, KV_C_ERRORS, KV_C_RESETS,
    KV_C_LOOKUP_PROBES, KV_C_STORES_CANCELLED, KV_C_LOADS_CANCELLED,
    /* Why blocks were evicted; each of them is in KV_C_EVICTED as well. */
    KV_C_EVICTED_CAPACITY,        /* to make room for another block */
    KV_C_EVICTED_CLEARED,         /* by a reset or the controller */
    KV_C_EVICTED_UNREADABLE,      /* its bytes could not be read back */
    KV_C_RECOVERED,               /* taken from a dead process that was filling or evicting it */
    KV_C_CPU_NS,                  /* worker: of its threads that copy; leader: of calls to it */
    KV_C_COUNT
} kv_counter;

/* W: the line's owner. */
typedef struct kv_counters { kv_au64 value[KV_COUNTERS]; } kv_counters;

/* What an operation took on one rank: all of it, from its submission on, and the copy alone. */
enum kv_latency { KV_LATENCY_TOTAL = 0, KV_LATENCY_COPY = 1 };

/* Bucket i counts the times above FIRST_NS << (i - 1), up to FIRST_NS << i; the last one has no
 * upper bound. W: the copy thread of the worker whose histogram it is. */
typedef struct kv_histogram {
    kv_au64 bucket[KV_LATENCY_BUCKETS];
    kv_au64 sum_ns;
} kv_histogram;

_Static_assert(sizeof(kv_counters) == 6 * 64, "counters: six lines");
_Static_assert(KV_HISTOGRAMS * sizeof(kv_histogram) == 25 * 64, "no two workers share a line");
_Static_assert((int)KV_C_COUNT <= (int)KV_COUNTERS, "counters fit");

static inline uint32_t kv_latency_bucket(uint64_t ns) {
    uint64_t steps = ns <= KV_LATENCY_FIRST_NS ? 0 : (ns - 1) / KV_LATENCY_FIRST_NS;
    uint32_t bucket = steps == 0 ? 0 : 64u - (uint32_t)__builtin_clzll(steps);
    return bucket < KV_LATENCY_BUCKETS ? bucket : KV_LATENCY_BUCKETS - 1;
}
static inline void kv_histogram_add(kv_histogram *h, uint64_t ns) {
    kv_u64_fetch_add_relaxed(&h->sum_ns, ns);
    kv_u64_fetch_add_relaxed(&h->bucket[kv_latency_bucket(ns)], 1);
}

#endif
