/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A slab: the file that holds one rank's disk tier, of fixed size from its first moment.
 *
 *     offset 0           superblock            one page; kvbm/tiers/disk.py
 *     table_offset       kv_slab_header[slots] 128 bytes each, padded to whole pages
 *     data_offset        slot 0, slot 1, ...   stride bytes each, whole pages
 *
 * A slot's data are its block's chunks in region order, one after the other: one vectored read or
 * write a block. The headers are contiguous, so that opening a slab reads 64 MB for a terabyte of
 * 2 MiB slots.
 *
 * ORDER OF A WRITE, so that a crash or a loss of power at any moment leaves each slot valid or
 * empty. All slots of an operation together:
 *     [B0] headers EMPTY, with the next generation; [B1] sync, if one of them was VALID;
 *     [B2] data;                                    [B3] sync;
 *     [B4] headers VALID, with the checksum of the data.
 * A header that is torn fails its own checksum: empty. [B4] is not followed by a sync: what is lost
 * with the power is empty again. Should a device break its promise about a sync, the checksum of
 * the data does not match when it is read, and the block is computed again.
 *
 * A private cache does not outlive its process: its slab has no name, and the syncs are left out.
 */
#ifndef KVBM_SLAB_H
#define KVBM_SLAB_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "xxh3.h"

#define KV_SLAB_MAGIC 0x31746c73626d766bull /* "kvbmslt1" */

enum kv_slab_state { KV_SLAB_EMPTY = 0, KV_SLAB_VALID = 1 };

/* W: the worker that fills the slot; R: the worker that reads it, and who opens the slab. */
typedef struct kv_slab_header {
    uint64_t magic;
    uint32_t state;
    uint32_t generation;    /* + 1 with every write of the slot */
    uint64_t digest_lo, digest_hi;
    uint64_t parent_lo, parent_hi; /* digest of the block before it in its chain; 0 for the first */
    uint64_t fingerprint;   /* first 8 bytes; the whole is in the superblock */
    uint64_t payload_bytes; /* sum of the chunks */
    uint64_t data_checksum; /* kv_checksum (copy.h) over the chunks in region order */
    uint64_t sequence_hash;
    uint64_t written_ns;    /* CLOCK_REALTIME; the order of age after a restart */
    uint32_t slot, position, group, rank;
    uint64_t reserved[2];   /* zero */
    uint64_t header_checksum;
} kv_slab_header;

_Static_assert(sizeof(kv_slab_header) == 128, "a slab header never crosses a sector");

static inline uint64_t kv_slab_header_sum(const kv_slab_header *header) {
    return kv_xxh3_64(header, offsetof(kv_slab_header, header_checksum), KV_SLAB_MAGIC);
}

static inline void kv_slab_header_seal(kv_slab_header *header) {
    header->magic = KV_SLAB_MAGIC;
    header->reserved[0] = header->reserved[1] = 0;
    header->header_checksum = kv_slab_header_sum(header);
}

/* 1 if these 128 bytes were written as a header, whatever it says. */
static inline int kv_slab_header_is_whole(const kv_slab_header *header) {
    return header->magic == KV_SLAB_MAGIC && header->header_checksum == kv_slab_header_sum(header);
}

/* 1 if these 128 bytes are the header of this slot and its data belong to this cache. */
static inline int kv_slab_header_holds(const kv_slab_header *header, uint32_t slot, uint32_t rank,
                                       uint64_t fingerprint, uint64_t payload_bytes) {
    return header->state == KV_SLAB_VALID && header->slot == slot && header->rank == rank &&
           header->fingerprint == fingerprint && header->payload_bytes == payload_bytes &&
           kv_slab_header_is_whole(header);
}

/* The system calls of a slab, so that a test can make them fail. */
typedef struct iovec kv_piece;
typedef ssize_t (*kv_transfer_call)(int fd, const kv_piece *pieces, int count, off_t offset);
typedef int (*kv_sync_call)(int fd);

typedef struct kv_slab_calls {
    kv_transfer_call read, write;
    kv_sync_call sync;
} kv_slab_calls;

static const kv_slab_calls kv_system_calls = {preadv, pwritev, fdatasync};

#endif
