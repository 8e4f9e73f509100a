/* SPDX-License-Identifier: Apache-2.0 */
/*
 * XXH3, 64-bit variant with a seed, for every input length.
 *
 * Written from the published description of the algorithm: "xxHash fast digest algorithm",
 * sections on XXH3, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
 * Names in brackets below are the description's.
 *
 *   bytes     path
 *   0         kv_xxh3_empty
 *   1..3      kv_xxh3_1to3
 *   4..8      kv_xxh3_4to8
 *   9..16     kv_xxh3_9to16
 *   17..128   kv_xxh3_17to128     16-byte pieces from both ends
 *   129..240  kv_xxh3_129to240    16-byte pieces from the start
 *   241..     kv_xxh3_long        64-byte stripes into eight accumulators: portable or AVX2
 *
 * The two bodies of the last path give the same result; which one runs is decided at each call by
 * what the processor can do, so that one build serves every x86-64 machine.
 *
 * Not a cryptographic hash: it protects from accidents (torn copies, bad disks, chance), not from
 * an adversary. A payload in several pieces is hashed by giving each piece the hash of the piece
 * before it as its seed.
 */
#ifndef KVBM_XXH3_H
#define KVBM_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "kvbm supports little-endian machines only: hashes and segment words are read in place"
#endif

__extension__ typedef unsigned __int128 kv_u128;

#define KV_PRIME32_1 0x9E3779B1U
#define KV_PRIME32_2 0x85EBCA77U
#define KV_PRIME32_3 0xC2B2AE3DU
#define KV_PRIME64_1 0x9E3779B185EBCA87ULL
#define KV_PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define KV_PRIME64_3 0x165667B19E3779F9ULL
#define KV_PRIME64_4 0x85EBCA77C2B2AE63ULL
#define KV_PRIME64_5 0x27D4EB2F165667C5ULL
#define KV_PRIME_MX1 0x165667919E3779F9ULL
#define KV_PRIME_MX2 0x9FB21C651E98DF25ULL

enum {
    KV_XXH3_SECRET_BYTES = 192,
    KV_XXH3_STRIPE_BYTES = 64,
    KV_XXH3_SECRET_STEP_BYTES = 8, /* the secret moves by this much from stripe to stripe */
    KV_XXH3_BLOCK_STRIPES =
        (KV_XXH3_SECRET_BYTES - KV_XXH3_STRIPE_BYTES) / KV_XXH3_SECRET_STEP_BYTES,
    KV_XXH3_BLOCK_BYTES = KV_XXH3_BLOCK_STRIPES * KV_XXH3_STRIPE_BYTES, /* 1024 */
    KV_XXH3_LAST_STRIPE_SECRET = KV_XXH3_SECRET_BYTES - 71,
    KV_XXH3_MERGE_SECRET = 11,
    KV_XXH3_MEDIUM_BYTES_MAX = 240,
};

/* The default secret of the description. */
static const uint8_t kv_xxh3_secret[KV_XXH3_SECRET_BYTES] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* memcpy, not a cast: inputs have any alignment; compilers make one load of it. */
static inline uint32_t kv_read32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t kv_read64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t kv_rotl64(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

static inline uint64_t kv_mul128_fold(uint64_t a, uint64_t b) {
    kv_u128 product = (kv_u128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t kv_xxh3_avalanche(uint64_t x) { /* [avalanche] */
    x ^= x >> 37;
    x *= KV_PRIME_MX1;
    return x ^ (x >> 32);
}

static inline uint64_t kv_xxh64_avalanche(uint64_t x) { /* [avalanche_XXH64] */
    x ^= x >> 33;
    x *= KV_PRIME64_2;
    x ^= x >> 29;
    x *= KV_PRIME64_3;
    return x ^ (x >> 32);
}

static inline uint64_t kv_xxh3_empty(uint64_t seed) {
    uint64_t key = kv_read64(kv_xxh3_secret + 56) ^ kv_read64(kv_xxh3_secret + 64);
    return kv_xxh64_avalanche(seed ^ key);
}

static inline uint64_t kv_xxh3_1to3(const uint8_t *p, size_t bytes, uint64_t seed) {
    uint32_t combined = (uint32_t)p[bytes - 1] | ((uint32_t)bytes << 8) | ((uint32_t)p[0] << 16) |
                        ((uint32_t)p[bytes >> 1] << 24);
    uint64_t key = (uint64_t)(kv_read32(kv_xxh3_secret) ^ kv_read32(kv_xxh3_secret + 4)) + seed;
    return kv_xxh64_avalanche(key ^ combined);
}

static inline uint64_t kv_xxh3_4to8(const uint8_t *p, size_t bytes, uint64_t seed) {
    uint64_t mixed_seed = seed ^ ((uint64_t)__builtin_bswap32((uint32_t)seed) << 32);
    uint64_t combined = (uint64_t)kv_read32(p + bytes - 4) | ((uint64_t)kv_read32(p) << 32);
    uint64_t key = (kv_read64(kv_xxh3_secret + 8) ^ kv_read64(kv_xxh3_secret + 16)) - mixed_seed;
    uint64_t x = key ^ combined;
    x ^= kv_rotl64(x, 49) ^ kv_rotl64(x, 24);
    x *= KV_PRIME_MX2;
    x ^= (x >> 35) + bytes;
    x *= KV_PRIME_MX2;
    return x ^ (x >> 28);
}

static inline uint64_t kv_xxh3_9to16(const uint8_t *p, size_t bytes, uint64_t seed) {
    uint64_t low_key = (kv_read64(kv_xxh3_secret + 24) ^ kv_read64(kv_xxh3_secret + 32)) + seed;
    uint64_t high_key = (kv_read64(kv_xxh3_secret + 40) ^ kv_read64(kv_xxh3_secret + 48)) - seed;
    uint64_t low = low_key ^ kv_read64(p);
    uint64_t high = high_key ^ kv_read64(p + bytes - 8);
    return kv_xxh3_avalanche(bytes + __builtin_bswap64(low) + high + kv_mul128_fold(low, high));
}

/* [mixStep]: 16 bytes of data, 16 bytes of secret, the seed. */
static inline uint64_t kv_xxh3_mix16(const uint8_t *p, size_t secret_offset, uint64_t seed) {
    const uint8_t *secret = kv_xxh3_secret + secret_offset;
    uint64_t first = kv_read64(p) ^ (kv_read64(secret) + seed);
    uint64_t second = kv_read64(p + 8) ^ (kv_read64(secret + 8) - seed);
    return kv_mul128_fold(first, second);
}

static inline uint64_t kv_xxh3_17to128(const uint8_t *p, size_t bytes, uint64_t seed) {
    uint64_t acc = bytes * KV_PRIME64_1;
    size_t rounds = ((bytes - 1) >> 5) + 1;
    for (size_t i = 0; i < rounds; i++) {
        acc += kv_xxh3_mix16(p + 16 * i, 32 * i, seed);
        acc += kv_xxh3_mix16(p + bytes - 16 * i - 16, 32 * i + 16, seed);
    }
    return kv_xxh3_avalanche(acc);
}

static inline uint64_t kv_xxh3_129to240(const uint8_t *p, size_t bytes, uint64_t seed) {
    uint64_t acc = bytes * KV_PRIME64_1;
    size_t pieces = bytes >> 4;
    for (size_t i = 0; i < 8; i++) {
        acc += kv_xxh3_mix16(p + 16 * i, 16 * i, seed);
    }
    acc = kv_xxh3_avalanche(acc);
    for (size_t i = 8; i < pieces; i++) {
        acc += kv_xxh3_mix16(p + 16 * i, 16 * (i - 8) + 3, seed);
    }
    return kv_xxh3_avalanche(acc + kv_xxh3_mix16(p + bytes - 16, 119, seed));
}

/* ---- more than 240 bytes ---- */

/* [deriveSecret] */
static inline void kv_xxh3_derive_secret(uint8_t *secret, uint64_t seed) {
    for (size_t i = 0; i < KV_XXH3_SECRET_BYTES; i += 16) {
        uint64_t even = kv_read64(kv_xxh3_secret + i) + seed;
        uint64_t odd = kv_read64(kv_xxh3_secret + i + 8) - seed;
        memcpy(secret + i, &even, 8);
        memcpy(secret + i + 8, &odd, 8);
    }
}

/* [accumulate]. Unrolled, so that -O2 keeps the accumulators of the caller in registers. */
static inline void kv_xxh3_stripe(uint64_t *acc, const uint8_t *p, const uint8_t *secret) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        uint64_t data = kv_read64(p + 8 * i);
        uint64_t value = data ^ kv_read64(secret + 8 * i);
        acc[i ^ 1] += data;
        acc[i] += (value & 0xFFFFFFFFU) * (value >> 32);
    }
}

/* [round_scramble] */
static inline void kv_xxh3_scramble(uint64_t *acc, const uint8_t *secret) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        uint64_t x = acc[i] ^ (acc[i] >> 47) ^ kv_read64(secret + 8 * i);
        acc[i] = x * KV_PRIME32_1;
    }
}

/*
 * A body adds everything but the last, possibly overlapping stripe: whole blocks of 1024 bytes,
 * each followed by a scramble, then the full stripes of the last block. bytes >= 1; the last block
 * is never empty, so a length that is a multiple of 1024 (or 64) leaves a whole block (or stripe)
 * to it.
 */
static void kv_xxh3_body_portable(uint64_t *acc_out, const uint8_t *p, size_t bytes,
                                  const uint8_t *secret) {
    uint64_t acc[8]; /* a copy that p cannot alias */
    memcpy(acc, acc_out, sizeof acc);
    size_t blocks = (bytes - 1) / KV_XXH3_BLOCK_BYTES;
    size_t stripes = (bytes - 1) % KV_XXH3_BLOCK_BYTES / KV_XXH3_STRIPE_BYTES;
    for (size_t b = 0; b < blocks; b++, p += KV_XXH3_BLOCK_BYTES) {
        for (size_t n = 0; n < KV_XXH3_BLOCK_STRIPES; n++) {
            kv_xxh3_stripe(acc, p + 64 * n, secret + 8 * n);
        }
        kv_xxh3_scramble(acc, secret + KV_XXH3_SECRET_BYTES - 64);
    }
    for (size_t n = 0; n < stripes; n++) {
        kv_xxh3_stripe(acc, p + 64 * n, secret + 8 * n);
    }
    memcpy(acc_out, acc, sizeof acc);
}

#if defined(__x86_64__)

#define KV_AVX2 __attribute__((target("avx2")))

/* Four of the eight lanes. _mm256_mul_epu32 multiplies the low halves: what [accumulate] wants. */
KV_AVX2 static inline __m256i kv_xxh3_lanes_avx2(__m256i acc, const uint8_t *p,
                                                 const uint8_t *secret) {
    __m256i data = _mm256_loadu_si256((const __m256i *)p);
    __m256i value = _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i *)secret));
    __m256i product = _mm256_mul_epu32(value, _mm256_srli_epi64(value, 32));
    __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2)); /* lane i xor 1 */
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, swapped));
}

/* x * PRIME32_1 out of 32-bit products: low half * prime + ((high half * prime) << 32). */
KV_AVX2 static inline __m256i kv_xxh3_scramble_avx2(__m256i x, const uint8_t *secret) {
    const __m256i prime = _mm256_set1_epi32((int)KV_PRIME32_1);
    x = _mm256_xor_si256(x, _mm256_srli_epi64(x, 47));
    x = _mm256_xor_si256(x, _mm256_loadu_si256((const __m256i *)secret));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
}

KV_AVX2 static void kv_xxh3_body_avx2(uint64_t *acc, const uint8_t *p, size_t bytes,
                                      const uint8_t *secret) {
    enum { AHEAD_BYTES = 1024 }; /* a prefetch may point past the end: a hint does not fault */
    __m256i low = _mm256_loadu_si256((const __m256i *)acc);
    __m256i high = _mm256_loadu_si256((const __m256i *)(acc + 4));
    size_t blocks = (bytes - 1) / KV_XXH3_BLOCK_BYTES;
    size_t stripes = (bytes - 1) % KV_XXH3_BLOCK_BYTES / KV_XXH3_STRIPE_BYTES;
    for (size_t b = 0; b < blocks; b++, p += KV_XXH3_BLOCK_BYTES) {
#pragma GCC unroll 4
        for (size_t n = 0; n < KV_XXH3_BLOCK_STRIPES; n++) {
            __builtin_prefetch(p + 64 * n + AHEAD_BYTES);
            low = kv_xxh3_lanes_avx2(low, p + 64 * n, secret + 8 * n);
            high = kv_xxh3_lanes_avx2(high, p + 64 * n + 32, secret + 8 * n + 32);
        }
        low = kv_xxh3_scramble_avx2(low, secret + KV_XXH3_SECRET_BYTES - 64);
        high = kv_xxh3_scramble_avx2(high, secret + KV_XXH3_SECRET_BYTES - 32);
    }
    for (size_t n = 0; n < stripes; n++) {
        low = kv_xxh3_lanes_avx2(low, p + 64 * n, secret + 8 * n);
        high = kv_xxh3_lanes_avx2(high, p + 64 * n + 32, secret + 8 * n + 32);
    }
    _mm256_storeu_si256((__m256i *)acc, low);
    _mm256_storeu_si256((__m256i *)(acc + 4), high);
}

#endif /* __x86_64__ */

/* Whether this processor has the faster body. */
static inline int kv_xxh3_has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

static uint64_t kv_xxh3_long(const uint8_t *p, size_t bytes, uint64_t seed, int portable) {
    uint64_t acc[8] = {KV_PRIME32_3, KV_PRIME64_1, KV_PRIME64_2, KV_PRIME64_3,
                       KV_PRIME64_4, KV_PRIME32_2, KV_PRIME64_5, KV_PRIME32_1};
    uint8_t secret[KV_XXH3_SECRET_BYTES];
    kv_xxh3_derive_secret(secret, seed);
#if defined(__x86_64__)
    if (!portable && kv_xxh3_has_avx2()) {
        kv_xxh3_body_avx2(acc, p, bytes, secret);
    } else
#endif
    {
        kv_xxh3_body_portable(acc, p, bytes, secret);
    }
    kv_xxh3_stripe(acc, p + bytes - KV_XXH3_STRIPE_BYTES, secret + KV_XXH3_LAST_STRIPE_SECRET);
    uint64_t result = bytes * KV_PRIME64_1; /* [finalMerge] */
    for (int i = 0; i < 8; i += 2) {
        const uint8_t *key = secret + KV_XXH3_MERGE_SECRET + 8 * i;
        result += kv_mul128_fold(acc[i] ^ kv_read64(key), acc[i + 1] ^ kv_read64(key + 8));
    }
    return kv_xxh3_avalanche(result);
}

/* ---- entry points ---- */

static inline uint64_t kv_xxh3_64_with_body(const void *data, size_t bytes, uint64_t seed,
                                            int portable) {
    const uint8_t *p = (const uint8_t *)data;
    if (bytes > KV_XXH3_MEDIUM_BYTES_MAX) {
        return kv_xxh3_long(p, bytes, seed, portable);
    }
    if (bytes > 128) {
        return kv_xxh3_129to240(p, bytes, seed);
    }
    if (bytes > 16) {
        return kv_xxh3_17to128(p, bytes, seed);
    }
    if (bytes > 8) {
        return kv_xxh3_9to16(p, bytes, seed);
    }
    if (bytes > 3) {
        return kv_xxh3_4to8(p, bytes, seed);
    }
    return bytes ? kv_xxh3_1to3(p, bytes, seed) : kv_xxh3_empty(seed);
}

/* XXH3_64bits_withSeed of `bytes` bytes at `data`, which may be null if bytes is 0. Never fails. */
static inline uint64_t kv_xxh3_64(const void *data, size_t bytes, uint64_t seed) {
    return kv_xxh3_64_with_body(data, bytes, seed, 0);
}

/* The same without the AVX2 body: tests compare the two, benchmarks show what dispatching gains. */
static inline uint64_t kv_xxh3_64_portable(const void *data, size_t bytes, uint64_t seed) {
    return kv_xxh3_64_with_body(data, bytes, seed, 1);
}

#endif /* KVBM_XXH3_H */
