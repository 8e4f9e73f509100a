/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Arithmetic on digests: 128 bits as two u64, `lo` and `hi`, in memory lo first.
 *
 * A block of KV-cache group g at key epoch e is stored under the digest of its tokens with g and e
 * mixed in. Both mixes are an exclusive or with a constant that depends on the number alone, hence
 *   - bijective: different digests stay different, nothing of the 128 bits is lost;
 *   - their own inverse: applying the same mix twice gives the digest back (the viewer uses it);
 *   - the identity for number 0, so that a model with one group stores the plain digest.
 * Two different (group, epoch) pairs meet in one place only if their constants have equal
 * exclusive ors in both halves, as likely as any other collision of 128 bits.
 */
#ifndef KVBM_DIGEST_H
#define KVBM_DIGEST_H

#include <stdint.h>

/* Finalizer of MurmurHash3 (public domain): a bijection of 64 bits that maps 0 to 0. */
static inline uint64_t kv_digest_spread(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDULL;
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53ULL;
    return x ^ (x >> 33);
}

/*
 * Odd multipliers: the product of a number below 2^32 and each of them is different for each
 * number, and 0 for 0. They keep the four families of constants apart.
 */
static inline void kv_digest_for_group(uint64_t *lo, uint64_t *hi, uint32_t group) {
    *lo ^= kv_digest_spread(group * 0x9E3779B97F4A7C15ULL);
    *hi ^= kv_digest_spread(group * 0xD1B54A32D192ED03ULL);
}

static inline void kv_digest_for_epoch(uint64_t *lo, uint64_t *hi, uint32_t epoch) {
    *lo ^= kv_digest_spread(epoch * 0x8CB92BA72F3D8DD7ULL);
    *hi ^= kv_digest_spread(epoch * 0xABC98388FB8FAC03ULL);
}

#endif /* KVBM_DIGEST_H */
