/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract of the shared segment. No other file computes an offset or knows a bit position, but
 * for counters.h, the records of what is counted.
 *
 *   offset 0      +--------------------------------------+
 *                 | kv_header          one page          |  identity, sizes, hot words on own lines
 *                 +--------------------------------------+
 *                 | kv_participant[KV_PARTICIPANTS]      |  who is attached; a line pair a process
 *                 | kv_counters[KV_PARTICIPANTS]         |  each process adds to its own line
 *                 | kv_histogram[KV_LEADERS][ranks][8]   |  each worker adds to its own ones
 *                 | kv_ring[KV_LEADERS][ranks]           |  leader -> worker: operations to run
 *                 | kv_operation[KV_LEADERS][KV_OPERATIONS_PER_LEADER]
 *                 | pool bitmaps: blocks, host, disk     |  a set bit is a free record or slot
 *                 | kv_bucket[index_buckets]             |  digest -> block, hints
 *                 | kv_block[block_capacity]             |  the radix tree: one cache line a block
 *                 | kv_block_cold[block_capacity]        |  what only events and the viewer need
 *                 +--------------------------------------+
 *
 * Only indices, never pointers. All sizes follow from kv_shape, which the header carries; a process
 * that attaches computes the offsets itself, compares the total with the size of the object, and
 * from then on trusts its own copy of the shape alone, so that a scribbled header cannot send it
 * out of bounds.
 *
 * THE PROTOCOL
 *
 * Block word (64 bits), everything that decides about a block in one place:
 *
 *     63..61 state | 60..45 holders, a bit a leader | 44..24 registered children | 23..0 generation
 *
 * States, and who may leave them:
 *     RESET       free. Whoever took the block's bit from the pool (or evicted it) moves it to
 *                 PARTIAL.
 *     PARTIAL     reserved by the one leader in `holders`, its bytes being filled. That leader, or
 *                 a worker that runs one of its operations, publishes it; that leader, or recovery
 *                 after its death, abandons it.
 *     REGISTERED  in the tree, matchable. Any leader may pin it, and evict it when nothing holds
 *                 it.
 *     EVICTING    leaving the tree; owned by the one leader in `holders` (or by recovery after its
 *                 death).
 *
 * Transitions; each is one compare-and-swap of the block word, which is its linearization point:
 *     reserve     RESET g      -> PARTIAL g, holders = {owner}
 *     publish     PARTIAL g    -> REGISTERED g, holders kept   (the parent counted first, below)
 *     pin         REGISTERED   -> REGISTERED, holders + owner
 *     unpin       REGISTERED   -> REGISTERED, holders - owner
 *     evict       REGISTERED g, no holder, no child -> EVICTING g + 1, holders = {owner}
 *     abandon     PARTIAL g    -> EVICTING g + 1, holders = {owner}
 *     reset       EVICTING     -> RESET, holders = {}
 *
 * Publish a child: [P1] count it on the parent: CAS that requires the parent REGISTERED and of the
 * expected generation, children + 1; [P2] its own word PARTIAL -> REGISTERED. Evict: [E1] the word
 * moves, with the generation; [E2] children - 1 on the parent, which inherits the child's recency;
 * [E3] the index entry is deleted; [E4] the placements are cleared; [E5] EVICTING -> RESET; [E6]
 * block record and slots go back to their pools or on to the next owner. A crash between any two
 * steps leaves a count too high at worst, never too low: a registered parent cannot be lost, at
 * worst it cannot be evicted until recovery has recounted.
 *
 * Invariants (checked by the stress tests and by the model):
 *     I1  a REGISTERED block's parent is REGISTERED, of the generation the child names, or the
 *         block is a root;
 *     I2  children(b) >= the number of REGISTERED blocks whose parent is b; equal when nobody is
 *         inside an operation and no crash has happened since the last recount;
 *     I3  a block is served only while a leader's bit keeps it REGISTERED, and its digest is
 *         compared after the pin;
 *     I4  a slot is named by at most one block that is not RESET;
 *     I5  the generation moves whenever a block leaves PARTIAL or REGISTERED, so a (block,
 *         generation) pair that is found again in these states means the same bytes. 24 bits: pairs
 *         are only kept while an operation or a pin of their owner protects them, so a wrap-around
 *         cannot meet a live pair.
 *
 * I1 is what makes presence along a chain monotone: the longest match is found by bisection, and
 * one pin on the deepest block of a match protects all of it.
 *
 * Index: two candidate buckets of eight entries (tag << 32 | block + 1). Entries are hints: a
 * reader compares the block's digest between two reads of its word and believes it only if the
 * generation did not move. A stale entry costs a miss and is deleted by whoever needs its place.
 * Two blocks may carry one digest (two leaders at once): both are right, one ages out.
 *
 * Reader against writer of a digest: the writer stores digest words with release after the word has
 * left REGISTERED [D0]; the reader loads them with acquire [D1] and then the word again [D2]. If it
 * saw a new digest word, [D0]/[D1] make it see the moved word in [D2].
 *
 * Inside / recovering (a Dekker pair, the only place that needs sequential consistency): a
 * participant that changes the structure (reserve, publish, evict, abandon) first shows `inside` in
 * its line [S0], then reads `recovering` [S1]; if a recovery is under way it declines (a skipped
 * store, a later publish) and never waits. Recovery stores `recovering` [S2], then reads every live
 * participant's `inside` [S3]. Either the participant sees the recovery or the recovery sees the
 * participant. With nobody inside, recovery may recount and rebuild; otherwise it only returns what
 * the dead held, and counts stay too high until the next one. Pins, unpins and look-ups never
 * decline.
 *
 * Operation word (64 bits): 63..60 state | 59..56 finishing rank | 55..32 generation | 31..0 two
 *     bits a rank (pending, running, done, failed). The leader writes rows and fields, then [O0]
 *     SUBMITTED with release. A rank claims pending -> running, and ends with done or failed, each
 *     one CAS. The CAS that leaves no rank pending or running decides the fate in the same step:
 *     all done -> FINISHING (a store or a fetch: that rank publishes the blocks) or COMPLETE; any
 *     failed -> FAILED. Cancel turns all pending ranks into failed ones. Only the leader recycles:
 *     COMPLETE / FAILED -> FREE with the next generation.
 *
 * Rings: one a worker, written by its leader alone, read by that worker alone. As many entries as a
 * leader has operations; those of cancelled ones stay until the worker looks, so the leader submits
 * no more than fits. [R0] head with release, [R1] head with acquire; [R2]/[R3] the same for tail.
 *
 * Free pools: bitmaps. Taking bits and giving them back is a CAS / fetch-or on one 64-bit word; a
 * summary word above is a hint. A taken bit that no block names (its taker died) comes back when
 * recovery rebuilds the pool.
 */
#ifndef KVBM_LAYOUT_H
#define KVBM_LAYOUT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "atomics.h"
#include "counters.h"

#define KV_MAGIC 0x314d42564b304730ull /* written last, with release, by the creator */
#define KV_FORMAT_VERSION 5u

enum {
    KV_PAGE = 4096,
    KV_LINE = 64,
    KV_LEADERS = 16,                                      /* bits of `holders` */
    KV_RANKS = 16,                                        /* two bits each in an operation word */
    KV_PARTICIPANTS = KV_LEADERS + KV_LEADERS * KV_RANKS, /* leaders, then each leader's ranks */
    KV_OPERATIONS_PER_LEADER = 128,
    KV_ROWS = 128,                                        /* blocks in one operation */
    KV_BUCKET_ENTRIES = 8,
    KV_DESCRIPTION_BYTES = 2048,
    KV_FINGERPRINT_BYTES = 32
};
#define KV_NONE 0xffffffffu

/* Storage tiers that the segment manages; the device pool belongs to the engine. */
enum kv_tier { KV_TIER_HOST = 0, KV_TIER_DISK = 1, KV_TIER_REMOTE = 2, KV_TIERS = 3 };
enum kv_pool_id { KV_POOL_BLOCKS = 0, KV_POOL_HOST = 1, KV_POOL_DISK = 2, KV_POOLS = 3 };

/* ---- block word ------------------------------------------------------------------------------ */
enum kv_block_state { KV_RESET = 0, KV_PARTIAL = 1, KV_REGISTERED = 2, KV_EVICTING = 3 };

#define KV_GENERATION_MASK 0xffffffull
#define KV_CHILD_ONE (1ull << 24)
#define KV_CHILDREN_MAX 0x1fffffull
#define KV_HOLDERS_SHIFT 45
#define KV_HOLDERS_MASK (0xffffull << KV_HOLDERS_SHIFT)

static inline uint32_t kv_word_state(uint64_t w) { return (uint32_t)(w >> 61); }
static inline uint32_t kv_word_holders(uint64_t w) {
    return (uint32_t)((w & KV_HOLDERS_MASK) >> KV_HOLDERS_SHIFT);
}
static inline uint32_t kv_word_children(uint64_t w) {
    return (uint32_t)((w >> 24) & KV_CHILDREN_MAX);
}
static inline uint32_t kv_word_generation(uint64_t w) { return (uint32_t)(w & KV_GENERATION_MASK); }
static inline uint64_t kv_holder_bit(uint32_t leader) {
    return 1ull << (KV_HOLDERS_SHIFT + leader);
}
static inline uint64_t kv_word_make(uint32_t state, uint32_t holders, uint32_t children,
                                    uint32_t generation) {
    return ((uint64_t)state << 61) | ((uint64_t)(holders & 0xffffu) << KV_HOLDERS_SHIFT) |
           (((uint64_t)children & KV_CHILDREN_MAX) << 24) | (generation & KV_GENERATION_MASK);
}

/* ---- placement word: 63..60 state | 55..32 generation of the block | 31..0 slot -------------- */
enum kv_placement_state { KV_EMPTY = 0, KV_FILLING = 1, KV_READY = 2 };

static inline uint64_t kv_placement_make(uint32_t state, uint32_t generation, uint32_t slot) {
    return ((uint64_t)state << 60) | ((uint64_t)(generation & KV_GENERATION_MASK) << 32) | slot;
}
static inline uint32_t kv_placement_state_of(uint64_t p) { return (uint32_t)(p >> 60); }
static inline uint32_t kv_placement_generation(uint64_t p) {
    return (uint32_t)((p >> 32) & KV_GENERATION_MASK);
}
static inline uint32_t kv_placement_slot(uint64_t p) { return (uint32_t)p; }

/* ---- recency: 63..48 priority | 47..0 tick ----------------------------------------------------
 * Smaller is evicted sooner: lowest priority, then least recently returned. Priorities above 65,535
 * count as 65,535. Ticks come from one counter, in batches. */
static inline uint64_t kv_recency_make(uint32_t priority, uint64_t tick) {
    return ((uint64_t)(priority > 0xffffu ? 0xffffu : priority) << 48) | (tick & 0xffffffffffffull);
}
static inline uint32_t kv_recency_priority(uint64_t r) { return (uint32_t)(r >> 48); }
static inline uint64_t kv_recency_tick(uint64_t r) { return r & 0xffffffffffffull; }

/* The radix tree's node. One cache line: a look-up touches a bucket and this. */
typedef struct kv_block {
    kv_au64 word;                 /* see above */
    kv_au64 digest_lo;            /* W: owner while RESET, release [D0]; R: acquire [D1] */
    kv_au64 digest_hi;
    kv_au64 recency;              /* W: a leader at unpin, or at the eviction of a child (maximum);
                                     relaxed: a lost or stale value costs eviction order, nothing
                                     else */
    kv_au32 parent;               /* block + 1, 0 = root. W: owner while RESET; stable while
                                     REGISTERED */
    kv_au32 parent_generation;
    kv_au64 placement[KV_TIERS];  /* W: owner while PARTIAL or EVICTING; publisher FILLING -> READY
                                     before [P2] */
} kv_block;

typedef struct kv_block_cold {
    kv_au64 sequence_hash;        /* upstream's 64-bit chain or the engine's; for events, never
                                     proof of identity */
    kv_au32 position;             /* depth in blocks from the root */
    kv_au32 group;                /* KV-cache group */
    kv_au64 registered_ns;        /* CLOCK_MONOTONIC at publish */
    kv_au32 uses;                 /* matches that ended here; W: owner while RESET, leaders that
                                     hold it. Two at once may count as one: a number to look at */
    uint32_t reserved;            /* zero */
} kv_block_cold;

/* ---- index ----------------------------------------------------------------------------------- */
typedef struct kv_bucket { kv_au64 entry[KV_BUCKET_ENTRIES]; } kv_bucket;

/* Finalizer of MurmurHash3: spreads digests that are not random. */
static inline uint64_t kv_mix64(uint64_t x) {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    x ^= x >> 33;
    return x;
}
static inline uint64_t kv_digest_hash(uint64_t lo, uint64_t hi) {
    return kv_mix64(lo ^ kv_mix64(hi));
}
static inline uint32_t kv_hash_tag(uint64_t h) { return (uint32_t)(h >> 32); }
static inline uint32_t kv_hash_bucket(uint64_t h, uint32_t mask) { return (uint32_t)h & mask; }
static inline uint32_t kv_other_bucket(uint32_t bucket, uint32_t tag, uint32_t mask) {
    /* The same from either side: an involution by xor. */
    uint32_t step = (uint32_t)(kv_mix64(tag) | 1u);
    return (bucket ^ step) & mask;
}

/* ---- operations ------------------------------------------------------------------------------ */
/* A store and a fetch fill blocks that are PARTIAL and publish them; a load and a spill read blocks
 * that are REGISTERED and held. Rows of a spill (host -> disk) and of a fetch (disk -> host) name
 * disk slots in place of device blocks. */
enum kv_operation_kind { KV_STORE = 1, KV_LOAD = 2, KV_SPILL = 3, KV_FETCH = 4 };

static inline int kv_fills_blocks(uint32_t kind) { return kind == KV_STORE || kind == KV_FETCH; }
static inline int kv_is_disk_kind(uint32_t kind) { return kind == KV_SPILL || kind == KV_FETCH; }

enum kv_operation_state {
    KV_OP_FREE = 0,
    KV_OP_SUBMITTED = 1,
    KV_OP_CANCELLED = 2,
    KV_OP_FINISHING = 3,
    KV_OP_COMPLETE = 4,
    KV_OP_FAILED = 5
};
enum kv_rank_state {
    KV_RANK_PENDING = 0,
    KV_RANK_RUNNING = 1,
    KV_RANK_DONE = 2,
    KV_RANK_FAILED = 3
};

static inline uint32_t kv_op_state(uint64_t w) { return (uint32_t)(w >> 60); }
static inline uint32_t kv_op_finisher(uint64_t w) { return (uint32_t)(w >> 56) & 0xfu; }
static inline uint32_t kv_op_generation(uint64_t w) {
    return (uint32_t)((w >> 32) & KV_GENERATION_MASK);
}
static inline uint32_t kv_op_rank(uint64_t w, uint32_t rank) {
    return (uint32_t)(w >> (2 * rank)) & 3u;
}
static inline uint64_t kv_op_make(uint32_t state, uint32_t finisher, uint32_t generation,
                                  uint32_t ranks) {
    return ((uint64_t)state << 60) | ((uint64_t)(finisher & 0xfu) << 56) |
           ((uint64_t)(generation & KV_GENERATION_MASK) << 32) | ranks;
}
static inline uint64_t kv_op_set_rank(uint64_t w, uint32_t rank, uint32_t rank_state) {
    return (w & ~(3ull << (2 * rank))) | ((uint64_t)rank_state << (2 * rank));
}

typedef struct kv_row {
    uint32_t device_block, slot;  /* a spill's and a fetch's disk slot stands in device_block */
    uint32_t block, generation;
    uint32_t reserved[4];         /* zero; keeps two rows in a cache line */
} kv_row;

typedef struct kv_operation {
    kv_au64 word;
    kv_au32 kind;                 /* W: leader before [O0]; relaxed: who cancels may look when it
                                     is another operation already, and is told so by the word */
    uint32_t row_count;           /* this and all that is plain: W: leader before [O0]; R: ranks
                                     that have claimed it, recovery */
    kv_au64 step;                 /* which forward pass it must wait for (worker_loop.pyx); relaxed,
                                     like kind */
    uint64_t request_key;         /* hash of the request id, for the viewer */
    uint64_t submitted_ns;
    kv_au64 completed_ns;         /* W: who ends it, before it does; relaxed; 0: cancelled */
    uint32_t leader, group;
    uint64_t reserved;
    kv_au64 failed_rows[KV_RANKS]; /* per rank: row + 1 that failed first, 0 = none; W: that rank;
                                      relaxed */
    kv_row rows[KV_ROWS];
} kv_operation;

static inline uint32_t kv_op_rows(const kv_operation *op) { /* once: it may be scribbled on */
    uint32_t rows = kv_u32_once(&op->row_count);
    return rows <= KV_ROWS ? rows : KV_ROWS;
}

typedef struct kv_ring {
    kv_au32 head;                 /* W: leader [R0] */
    kv_au32 doorbell;             /* W: who wants the worker to look; the worker sleeps on it */
    uint8_t pad0[KV_LINE - 8];
    kv_au32 tail;                 /* W: worker [R2] */
    uint8_t pad1[KV_LINE - 4];
    kv_au64 entry[KV_OPERATIONS_PER_LEADER]; /* see below */
} kv_ring;

/* ---- ring entry: 63..32 generation | 10..8 kind | 7..0 operation. The kind is in it because the
 * operation may be another one by the time the worker looks. */
static inline uint64_t kv_entry_make(uint32_t generation, uint32_t kind, uint32_t index) {
    return ((uint64_t)generation << 32) | (kind << 8) | index;
}
static inline uint32_t kv_entry_kind(uint64_t e) { return (uint32_t)(e >> 8) & 7u; }
/* generation << 32 | operation: what leaders and engines call a handle. */
static inline uint64_t kv_entry_handle(uint64_t e) { return e & ~0x700ull; }

/* ---- participants ---------------------------------------------------------------------------- */
enum kv_role { KV_ROLE_NONE = 0, KV_ROLE_LEADER = 1, KV_ROLE_WORKER = 2 };

/* W: its process, after it holds the line's lock; recovery after its death. */
typedef struct kv_participant {
    kv_au32 inside;               /* [S0] 1 while it changes the structure */
    kv_au32 role;
    kv_au32 epoch;                /* + 1 each time the line is claimed */
    kv_au32 pid;                  /* for people; liveness is the lock */
    kv_au64 engine_key;           /* hash of the engine id: a worker finds its leader by it */
    kv_au64 started_ns;           /* CLOCK_REALTIME */
    kv_au64 step_bound;           /* worker: last step whose metadata it has seen */
    kv_au64 step_filled;          /* worker: last step whose forward pass has filled its blocks */
    kv_au32 attached;             /* worker: 1 once its arena is usable */
    kv_au32 disk_slots;           /* worker: slots of its slab once it is usable, 0 before */
    uint8_t pad[128 - 56];
} kv_participant;

/* ---- shape and header ------------------------------------------------------------------------ */
typedef struct kv_shape {
    uint32_t block_capacity, host_slots, disk_slots, ranks;
    uint32_t block_tokens, index_buckets, private_instance, check; /* kv_header_check, or 0 */
} kv_shape;

typedef struct kv_header {
    kv_au64 magic;
    uint32_t format_version, layout_check;   /* layout_check: sizes of all structs, so that two
                                                builds that disagree refuse each other */
    kv_shape shape;
    uint64_t total_bytes;
    uint64_t nonce;                          /* of this content; arenas carry it too */
    uint64_t created_ns;                     /* CLOCK_REALTIME */
    uint8_t fingerprint[KV_FINGERPRINT_BYTES];
    uint8_t pad0[2 * KV_LINE - 104];
    kv_au64 tick;                            /* recency clock */
    uint8_t pad1[KV_LINE - 8];
    kv_au32 recovering;                      /* [S2]; owned by the holder of the recovery lock */
    kv_au32 key_epoch;                       /* mixed into digests; + 1 makes all older content
                                                unreachable */
    uint8_t pad2[KV_LINE - 8];
    kv_au32 ready_slots[KV_RANKS];           /* host slots whose memory is usable on a rank */
    uint8_t pad3[KV_LINE];
    uint8_t description[KV_DESCRIPTION_BYTES]; /* JSON, what the fingerprint was made of */
    uint8_t pad4[KV_PAGE - 6 * KV_LINE - KV_DESCRIPTION_BYTES];
} kv_header;

_Static_assert(sizeof(kv_block) == KV_LINE, "a block is one cache line");
_Static_assert(sizeof(kv_bucket) == KV_LINE, "a bucket is one cache line");
_Static_assert(sizeof(kv_block_cold) == 32, "cold record");
_Static_assert(sizeof(kv_row) == 32, "row");
_Static_assert(sizeof(kv_operation) == 3 * KV_LINE + KV_ROWS * sizeof(kv_row),
               "operation: three lines and rows");
_Static_assert(sizeof(kv_ring) == 2 * KV_LINE + 8 * KV_OPERATIONS_PER_LEADER, "ring");
_Static_assert(sizeof(kv_participant) == 128, "participant: two lines");
_Static_assert(sizeof(kv_shape) == 32 && sizeof(kv_header) == KV_PAGE, "header: one page");
_Static_assert(offsetof(kv_header, tick) == 2 * KV_LINE, "hot words start on a line");
_Static_assert(offsetof(kv_header, recovering) == 3 * KV_LINE, "hot words start on a line");
_Static_assert(offsetof(kv_header, ready_slots) == 4 * KV_LINE, "hot words start on a line");

#define KV_LAYOUT_CHECK                                                                            \
    ((uint32_t)(sizeof(kv_header) * 31u + sizeof(kv_participant) * 131u +                          \
                sizeof(kv_counters) * 137u + sizeof(kv_ring) * 139u +                              \
                sizeof(kv_operation) * 149u + sizeof(kv_bucket) * 151u +                           \
                sizeof(kv_block) * 157u + sizeof(kv_block_cold) * 163u +                           \
                KV_LEADERS * 167u + KV_RANKS * 173u + sizeof(kv_histogram) * 179u))

/* Checksum of what the creator writes once, of a private copy of the header: one that was scribbled
 * on may describe other sizes with the same total, and is refused. */
static inline uint32_t kv_header_check(const kv_header *h) {
    const size_t range[2][2] = {{offsetof(kv_header, format_version), offsetof(kv_header, pad0)},
                                {offsetof(kv_header, description), offsetof(kv_header, pad4)}};
    uint64_t sum = 0, word;
    for (int part = 0; part < 2; part++)
        for (size_t at = range[part][0]; at < range[part][1]; at += sizeof word) {
            memcpy(&word, (const uint8_t *)h + at, sizeof word);
            if (at == offsetof(kv_header, shape.private_instance)) word &= 0xffffffffull; /* own */
            sum = kv_mix64(sum ^ word) + 1;
        }
    return (uint32_t)(sum >> 32);
}

/* One process's picture of a mapped segment: pointers and a private copy of the shape, never read
 * back from shared memory. Every function of the protocol takes it. */
typedef struct kv_pool_view {
    kv_au64 *words, *summary;
    uint32_t capacity, word_count, summary_count;
} kv_pool_view;

typedef struct kv_view {
    kv_header *header;
    kv_participant *participants;
    kv_counters *counters;
    kv_histogram *histograms;
    kv_ring *rings;
    kv_operation *operations;
    kv_pool_view pool[KV_POOLS];
    kv_bucket *buckets;
    kv_block *blocks;
    kv_block_cold *cold;
    kv_shape shape;
    uint32_t bucket_mask;
    uint32_t self;                /* own participant line, KV_NONE for a reader */
    uint32_t leader;              /* leader slot whose bit and operations this process uses */
    uint64_t total_bytes;
} kv_view;

static inline uint64_t kv_align(uint64_t n, uint64_t a) { return (n + a - 1) / a * a; }

static inline uint32_t kv_pool_capacity(const kv_shape *s, int pool) {
    return pool == KV_POOL_BLOCKS ? s->block_capacity
           : pool == KV_POOL_HOST ? s->host_slots
                                  : s->disk_slots;
}

/* Fill `view` for a segment of shape `s` mapped at `base` (NULL: only the total is wanted). Returns
 * the total size in bytes, 0 for a shape that is out of bounds. */
static inline uint64_t kv_view_init(kv_view *view, uint8_t *base, const kv_shape *s) {
    uint64_t at = KV_PAGE;
    if (s->block_capacity == 0 || s->block_capacity > 0x7fffffffu ||
        s->host_slots > 0x7fffffffu || s->disk_slots > 0x7fffffffu || s->ranks == 0 ||
        s->ranks > KV_RANKS || s->index_buckets == 0 || s->index_buckets > 0x10000000u ||
        (s->index_buckets & (s->index_buckets - 1)) != 0 || s->block_tokens == 0)
        return 0;
    memset(view, 0, sizeof *view);
    view->shape = *s;
    view->bucket_mask = s->index_buckets - 1;
    view->self = view->leader = KV_NONE;
    view->header = (kv_header *)base;
#define KV_SECTION(field, type, count)                                                             \
    view->field = (type *)((uintptr_t)base + at);                                                  \
    at = kv_align(at + (uint64_t)(count) * sizeof(type), KV_PAGE)
    KV_SECTION(participants, kv_participant, KV_PARTICIPANTS);
    KV_SECTION(counters, kv_counters, KV_PARTICIPANTS);
    KV_SECTION(histograms, kv_histogram, KV_LEADERS * s->ranks * KV_HISTOGRAMS);
    KV_SECTION(rings, kv_ring, KV_LEADERS * s->ranks);
    KV_SECTION(operations, kv_operation, KV_LEADERS * KV_OPERATIONS_PER_LEADER);
    for (int pool = 0; pool < KV_POOLS; pool++) {
        kv_pool_view *p = &view->pool[pool];
        p->capacity = kv_pool_capacity(s, pool);
        p->word_count = (p->capacity + 63) / 64;
        p->summary_count = (p->word_count + 63) / 64;
        KV_SECTION(pool[pool].words, kv_au64, p->word_count);
        KV_SECTION(pool[pool].summary, kv_au64, p->summary_count);
    }
    KV_SECTION(buckets, kv_bucket, s->index_buckets);
    KV_SECTION(blocks, kv_block, s->block_capacity);
    KV_SECTION(cold, kv_block_cold, s->block_capacity);
#undef KV_SECTION
    view->total_bytes = at;
    return at;
}

/* Participant line of a leader's worker. */
static inline uint32_t kv_worker_line(uint32_t leader, uint32_t rank) {
    return KV_LEADERS + leader * KV_RANKS + rank;
}
static inline kv_ring *kv_ring_of(const kv_view *v, uint32_t leader, uint32_t rank) {
    return &v->rings[(uint64_t)leader * v->shape.ranks + rank];
}
/* Histogram of a worker; `kind` is one of kv_operation_kind. */
static inline kv_histogram *kv_histogram_of(const kv_view *v, uint32_t leader, uint32_t rank,
                                            uint32_t kind, uint32_t latency) {
    uint64_t worker = (uint64_t)leader * v->shape.ranks + rank;
    return &v->histograms[worker * KV_HISTOGRAMS + 2 * (kind - KV_STORE) + latency];
}
static inline kv_operation *kv_operation_at(const kv_view *v, uint32_t leader, uint32_t index) {
    return &v->operations[(uint64_t)leader * KV_OPERATIONS_PER_LEADER + index];
}
static inline void kv_count(const kv_view *v, kv_counter counter, uint64_t n) {
    if (v->self != KV_NONE) kv_u64_fetch_add_relaxed(&v->counters[v->self].value[counter], n);
}

#endif
