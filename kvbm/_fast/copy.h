/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What one rank's KV cache and its host arena look like to a copy, the 64-byte header of a slot,
 * and the loops that move bytes.
 *
 *     device block b, region r    base_r + b * block_stride_r                         chunk_r bytes
 *     slot s, region r            data + k * group_bytes + n_k * slot_offset_r + (s % G) * chunk_r
 *
 * with G = group_slots, k = s / G the slot's group, n_k the slots of that group (G, fewer in the
 * last one) and slot_offset_r the sum of the chunks before r. So a run of slots inside a group is
 * one contiguous piece a region. kvbm/transfer/arena_layout.py has the same arithmetic in Python,
 * and a test compares the two.
 *
 * SLOT HEADER. One word decides: state, whether there is a checksum, generation. A store moves it
 * to FILLING before the first byte changes [H0] and to VALID, with release, after the last field is
 * written [H1]. A load reads it with acquire before it copies [H2] and again afterwards [H3], and
 * compares digest, rank, group and size under it. What keeps a slot from being refilled while it is
 * read is the pin of its block; the header is the second line. It catches a slot that was filled
 * half (its writer died), one that was filled for somebody else, and one that was scribbled on.
 */
#ifndef KVBM_COPY_H
#define KVBM_COPY_H

#include "layout.h"
#include "xxh3.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum {
    KV_RUN_ROWS_MAX = 64,      /* rows copied together: bounds the stack of a run */
    KV_REGIONS_MAX = 16384,
    KV_CHECKSUM_PIECE = 4096,  /* bytes hashed at a time; part of the format, see kv_checksum */
    KV_STREAM_BYTES_MIN = 2048 /* shorter copies leave the destination in the cache */
};

enum kv_copy_direction { KV_COPY_STORE = 1, KV_COPY_LOAD = 2 };
enum kv_copy_flag { KV_COPY_WITH_CHECKSUM = 1 };

enum kv_copy_status {
    KV_COPY_OK = 0,
    KV_COPY_STOPPED = 1,     /* should_stop said so */
    KV_COPY_BAD_BLOCK = 2,   /* device block beyond the KV cache */
    KV_COPY_BAD_SLOT = 3,    /* slot beyond the arena, or its memory is not usable yet */
    KV_COPY_BAD_HEADER = 4,  /* load: another digest, generation, rank, group or size in the slot */
    KV_COPY_TORN = 5,        /* load: the slot's header changed while it was copied */
    KV_COPY_NO_CHECKSUM = 6, /* load: to be verified, but the slot was stored without a checksum */
    KV_COPY_BAD_CHECKSUM = 7 /* load: the bytes that arrived are not the bytes that were stored */
};

/* ---- slot header word: 63..60 state | 59 checksum present | 31..0 generation ---------------- */
enum kv_slot_state { KV_SLOT_EMPTY = 0, KV_SLOT_FILLING = 1, KV_SLOT_VALID = 2 };
#define KV_SLOT_HAS_CHECKSUM (1ull << 59)

static inline uint64_t kv_slot_word_make(uint32_t state, uint64_t flags, uint32_t generation) {
    return ((uint64_t)state << 60) | flags | generation;
}

/* W: the worker that fills the slot; R: the worker that loads it, and the viewer. */
typedef struct kv_slot_header {
    kv_au64 word;
    kv_au64 digest_lo, digest_hi;
    kv_au64 checksum;      /* kv_checksum over the chunks in region order, the first seed is 0 */
    kv_au64 payload_bytes; /* sum of the chunks */
    kv_au32 block;         /* index in the block table when it was stored; for the viewer */
    kv_au32 group;         /* KV-cache group */
    kv_au32 rank;
    kv_au32 reserved0;
    kv_au64 reserved1;
} kv_slot_header;

_Static_assert(sizeof(kv_slot_header) == KV_LINE, "a slot header is one cache line");

typedef struct kv_region {
    uint8_t *base;         /* device block 0 */
    uint64_t block_stride; /* bytes from one device block to the next */
    uint64_t chunk_bytes;
    uint64_t slot_offset;  /* sum of the chunks of the regions before */
} kv_region;

typedef struct kv_arena {
    uint8_t *base;
    uint64_t table_offset, data_offset, group_bytes;
    uint32_t slots, group_slots;
    kv_au32 usable_slots;  /* slots whose memory is reserved; grows while another thread copies */
    uint32_t reserved;
} kv_arena;

/* Everything about one rank and one KV-cache group that does not change between copies. */
typedef struct kv_copier {
    kv_arena arena;
    kv_region *regions;
    uint32_t region_count, device_blocks;
    uint64_t block_bytes;  /* sum of the chunks */
    uint32_t run_rows_max; /* 1 .. KV_RUN_ROWS_MAX */
    uint32_t rank, group, reserved;
} kv_copier;

/* Rows that are neighbours on both sides. Made of private copies of the rows, so that a row in
 * shared memory that changes meanwhile cannot pass a check and then be used with another value. */
typedef struct kv_copy_run {
    uint32_t device_block, slot, count;
    uint32_t block[KV_RUN_ROWS_MAX];
    uint32_t generation[KV_RUN_ROWS_MAX];
    uint64_t checksum[KV_RUN_ROWS_MAX];
    const uint64_t *digests; /* (lo, hi) of the first row; the caller's private memory */
} kv_copy_run;

typedef struct kv_copy_result {
    int status;            /* enum kv_copy_status */
    uint32_t row;          /* rows before it are complete; the number of rows when all is well */
} kv_copy_result;

#if defined(__SSE2__)
/* Whole lines past the cache, `to` aligned to a line. `ahead`, if there is one, is fetched into the
 * cache meanwhile. */
static inline void kv_stream_lines(uint8_t *to, const uint8_t *from, size_t lines,
                                   const uint8_t *ahead) {
    for (size_t i = 0; i < lines; i++) {
        const __m128i *f = (const __m128i *)(const void *)(from + i * KV_LINE);
        __m128i *t = (__m128i *)(void *)(to + i * KV_LINE);
        if (ahead != NULL) _mm_prefetch((const char *)ahead + i * KV_LINE, _MM_HINT_T0);
        __m128i a = _mm_loadu_si128(f), b = _mm_loadu_si128(f + 1);
        __m128i c = _mm_loadu_si128(f + 2), d = _mm_loadu_si128(f + 3);
        _mm_stream_si128(t, a);
        _mm_stream_si128(t + 1, b);
        _mm_stream_si128(t + 2, c);
        _mm_stream_si128(t + 3, d);
    }
}
#endif

/* Copy past the cache: nobody reads the bytes again soon on this core, and an ordinary store would
 * first read each line of the destination from memory. bench/bench_copy.py has the numbers. The
 * stores are weakly ordered: kv_stream_end before anything that says that the bytes are there. */
static inline void kv_stream_copy(uint8_t *to, const uint8_t *from, size_t bytes,
                                  const uint8_t *ahead) {
#if defined(__SSE2__)
    if (bytes >= KV_STREAM_BYTES_MIN) {
        size_t head = (size_t)(-(uintptr_t)to & (KV_LINE - 1));
        size_t lines = (bytes - head) / KV_LINE, done = head + lines * KV_LINE;
        memcpy(to, from, head);
        kv_stream_lines(to + head, from + head, lines, ahead);
        to += done;
        from += done;
        bytes -= done;
    }
#else
    (void)ahead;
#endif
    memcpy(to, from, bytes);
}

static inline void kv_stream_end(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Checksum of a chunk: XXH3-64 of each piece of it, seeded with the result before. */
static inline uint64_t kv_checksum(const uint8_t *from, size_t bytes, uint64_t seed) {
    for (size_t at = 0; at < bytes; at += KV_CHECKSUM_PIECE) {
        size_t left = bytes - at;
        seed = kv_xxh3_64(from + at, left < KV_CHECKSUM_PIECE ? left : KV_CHECKSUM_PIECE, seed);
    }
    return seed;
}

/* Copy a chunk and return its checksum. Each piece goes through a buffer in the first-level cache,
 * so that the bytes that are hashed are the bytes that are written, whatever happens to the source
 * meanwhile; the next piece is fetched while this one is written. */
static inline uint64_t kv_stream_copy_checksum(uint8_t *to, const uint8_t *from, size_t bytes,
                                               uint64_t seed) {
    _Alignas(KV_LINE) uint8_t piece[KV_CHECKSUM_PIECE];
    for (size_t at = 0; at < bytes;) {
        size_t left = bytes - at, n = left < KV_CHECKSUM_PIECE ? left : KV_CHECKSUM_PIECE;
        memcpy(piece, from + at, n);
        seed = kv_xxh3_64(piece, n, seed);
        kv_stream_copy(to + at, piece, n, left >= 2 * KV_CHECKSUM_PIECE ? from + at + n : NULL);
        at += n;
    }
    return seed;
}

#endif
