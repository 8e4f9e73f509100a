# SPDX-License-Identifier: Apache-2.0
# Declarations of layout.h, no logic. Cython uses C's sizes and offsets, so the header stays the
# single truth.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au32, kv_au64

cdef extern from "layout.h" nogil:
    const uint64_t KV_MAGIC
    const uint32_t KV_FORMAT_VERSION
    const uint32_t KV_LAYOUT_CHECK
    const uint32_t KV_NONE
    const uint64_t KV_CHILD_ONE
    const uint64_t KV_CHILDREN_MAX
    const uint64_t KV_HOLDERS_MASK
    const uint64_t KV_GENERATION_MASK
    enum:
        KV_PAGE
        KV_LEADERS
        KV_RANKS
        KV_PARTICIPANTS
        KV_OPERATIONS_PER_LEADER
        KV_ROWS
        KV_BUCKET_ENTRIES
        KV_COUNTERS
        KV_LATENCY_BUCKETS
        KV_LATENCY_FIRST_NS
        KV_LATENCY_KINDS
        KV_HISTOGRAMS
        KV_LATENCY_TOTAL
        KV_LATENCY_COPY
        KV_DESCRIPTION_BYTES
        KV_FINGERPRINT_BYTES
        KV_TIER_HOST
        KV_TIER_DISK
        KV_TIERS
        KV_POOL_BLOCKS
        KV_POOL_HOST
        KV_POOL_DISK
        KV_POOLS
        KV_RESET
        KV_PARTIAL
        KV_REGISTERED
        KV_EVICTING
        KV_EMPTY
        KV_FILLING
        KV_READY
        KV_STORE
        KV_LOAD
        KV_SPILL
        KV_FETCH
        KV_OP_FREE
        KV_OP_SUBMITTED
        KV_OP_CANCELLED
        KV_OP_FINISHING
        KV_OP_COMPLETE
        KV_OP_FAILED
        KV_RANK_PENDING
        KV_RANK_RUNNING
        KV_RANK_DONE
        KV_RANK_FAILED
        KV_ROLE_NONE
        KV_ROLE_LEADER
        KV_ROLE_WORKER

    ctypedef enum kv_counter:
        KV_C_LOOKUPS
        KV_C_LOOKUP_BLOCKS
        KV_C_MATCHED_BLOCKS
        KV_C_RESERVED
        KV_C_PUBLISHED
        KV_C_EVICTED
        KV_C_ABANDONED
        KV_C_DEDUPLICATED
        KV_C_STORES
        KV_C_LOADS
        KV_C_STORES_FAILED
        KV_C_LOADS_FAILED
        KV_C_BLOCKS_STORED
        KV_C_BLOCKS_LOADED
        KV_C_BYTES_STORED
        KV_C_BYTES_LOADED
        KV_C_STORE_NS
        KV_C_LOAD_NS
        KV_C_SKIPPED_NO_SLOT
        KV_C_SKIPPED_NO_OPERATION
        KV_C_DECLINED
        KV_C_INDEX_FULL
        KV_C_STALE_ENTRIES
        KV_C_CHECK_FAILURES
        KV_C_RECOVERIES
        KV_C_MATCHED_TOKENS
        KV_C_ERRORS
        KV_C_RESETS
        KV_C_LOOKUP_PROBES
        KV_C_STORES_CANCELLED
        KV_C_LOADS_CANCELLED
        KV_C_EVICTED_CAPACITY
        KV_C_EVICTED_CLEARED
        KV_C_EVICTED_UNREADABLE
        KV_C_RECOVERED
        KV_C_CPU_NS
        KV_C_COUNT

    uint32_t kv_word_state(uint64_t w) noexcept
    uint32_t kv_word_holders(uint64_t w) noexcept
    uint32_t kv_word_children(uint64_t w) noexcept
    uint32_t kv_word_generation(uint64_t w) noexcept
    uint64_t kv_holder_bit(uint32_t leader) noexcept
    uint64_t kv_word_make(uint32_t state, uint32_t holders, uint32_t children,
                          uint32_t generation) noexcept

    uint64_t kv_placement_make(uint32_t state, uint32_t generation, uint32_t slot) noexcept
    uint32_t kv_placement_state_of(uint64_t p) noexcept
    uint32_t kv_placement_generation(uint64_t p) noexcept
    uint32_t kv_placement_slot(uint64_t p) noexcept

    uint64_t kv_recency_make(uint32_t priority, uint64_t tick) noexcept
    uint32_t kv_recency_priority(uint64_t r) noexcept
    uint64_t kv_recency_tick(uint64_t r) noexcept

    uint64_t kv_mix64(uint64_t x) noexcept
    uint64_t kv_digest_hash(uint64_t lo, uint64_t hi) noexcept
    uint32_t kv_hash_tag(uint64_t h) noexcept
    uint32_t kv_hash_bucket(uint64_t h, uint32_t mask) noexcept
    uint32_t kv_other_bucket(uint32_t bucket, uint32_t tag, uint32_t mask) noexcept

    uint64_t kv_mix64(uint64_t x) noexcept
    bint kv_fills_blocks(uint32_t kind) noexcept
    bint kv_is_disk_kind(uint32_t kind) noexcept
    uint32_t kv_op_state(uint64_t w) noexcept
    uint32_t kv_op_finisher(uint64_t w) noexcept
    uint32_t kv_op_generation(uint64_t w) noexcept
    uint32_t kv_op_rank(uint64_t w, uint32_t rank) noexcept
    uint64_t kv_op_make(uint32_t state, uint32_t finisher, uint32_t generation,
                        uint32_t ranks) noexcept
    uint64_t kv_op_set_rank(uint64_t w, uint32_t rank, uint32_t rank_state) noexcept

    uint64_t kv_entry_make(uint32_t generation, uint32_t kind, uint32_t index) noexcept
    uint32_t kv_entry_kind(uint64_t e) noexcept
    uint64_t kv_entry_handle(uint64_t e) noexcept

    ctypedef struct kv_block:
        kv_au64 word
        kv_au64 digest_lo
        kv_au64 digest_hi
        kv_au64 recency
        kv_au32 parent
        kv_au32 parent_generation
        kv_au64 placement[3]

    ctypedef struct kv_block_cold:
        kv_au64 sequence_hash
        kv_au32 position
        kv_au32 group
        kv_au64 registered_ns
        kv_au32 uses

    ctypedef struct kv_bucket:
        kv_au64 entry[8]

    ctypedef struct kv_row:
        uint32_t device_block
        uint32_t slot
        uint32_t block
        uint32_t generation
        uint32_t reserved[4]

    ctypedef struct kv_operation:
        kv_au64 word
        kv_au32 kind
        uint32_t row_count
        kv_au64 step
        uint64_t request_key
        uint64_t submitted_ns
        kv_au64 completed_ns
        uint32_t leader
        uint32_t group
        kv_au64 failed_rows[16]
        kv_row rows[128]

    ctypedef struct kv_ring:
        kv_au32 head
        kv_au32 doorbell
        kv_au32 tail
        kv_au64 entry[128]

    ctypedef struct kv_participant:
        kv_au32 inside
        kv_au32 role
        kv_au32 epoch
        kv_au32 pid
        kv_au64 engine_key
        kv_au64 started_ns
        kv_au64 step_bound
        kv_au64 step_filled
        kv_au32 attached
        kv_au32 disk_slots

    ctypedef struct kv_counters:
        kv_au64 value[48]

    ctypedef struct kv_histogram:
        kv_au64 bucket[24]
        kv_au64 sum_ns

    ctypedef struct kv_shape:
        uint32_t block_capacity
        uint32_t host_slots
        uint32_t disk_slots
        uint32_t ranks
        uint32_t block_tokens
        uint32_t index_buckets
        uint32_t private_instance
        uint32_t check

    ctypedef struct kv_header:
        kv_au64 magic
        uint32_t format_version
        uint32_t layout_check
        kv_shape shape
        uint64_t total_bytes
        uint64_t nonce
        uint64_t created_ns
        uint8_t fingerprint[32]
        kv_au64 tick
        kv_au32 recovering
        kv_au32 key_epoch
        kv_au32 ready_slots[16]
        uint8_t description[2048]

    ctypedef struct kv_pool_view:
        kv_au64 *words
        kv_au64 *summary
        uint32_t capacity
        uint32_t word_count
        uint32_t summary_count

    ctypedef struct kv_view:
        kv_header *header
        kv_participant *participants
        kv_counters *counters
        kv_histogram *histograms
        kv_ring *rings
        kv_operation *operations
        kv_pool_view pool[3]
        kv_bucket *buckets
        kv_block *blocks
        kv_block_cold *cold
        kv_shape shape
        uint32_t bucket_mask
        uint32_t self "self"
        uint32_t leader
        uint64_t total_bytes

    uint32_t kv_header_check(const kv_header *h) noexcept
    uint32_t kv_op_rows(const kv_operation *op) noexcept
    uint64_t kv_view_init(kv_view *view, uint8_t *base, const kv_shape *s) noexcept
    uint32_t kv_worker_line(uint32_t leader, uint32_t rank) noexcept
    kv_ring *kv_ring_of(const kv_view *v, uint32_t leader, uint32_t rank) noexcept
    kv_operation *kv_operation_at(const kv_view *v, uint32_t leader, uint32_t index) noexcept
    kv_histogram *kv_histogram_of(const kv_view *v, uint32_t leader, uint32_t rank, uint32_t kind,
                                  uint32_t latency) noexcept
    void kv_histogram_add(kv_histogram *h, uint64_t ns) noexcept
    uint32_t kv_latency_bucket(uint64_t ns) noexcept
    void kv_count(const kv_view *v, kv_counter counter, uint64_t n) noexcept
