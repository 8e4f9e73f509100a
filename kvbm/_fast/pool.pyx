# SPDX-License-Identifier: Apache-2.0
"""Free block records and free slots: bitmaps in the segment, taken in runs.

A set bit is free. Taking a run and giving a bit back are each one atomic step on one 64-bit word,
so no two takers get the same bit. A summary word has a bit for each word that may have free bits;
it is a hint:

* taker: clears bits of a word (CAS); if the word became 0 it clears the summary bit, then looks at
  the word once more and sets the summary bit again if somebody gave bits back in between;
* giver: sets the bit of the word, then the summary bit.

Either the giver's summary bit comes after the taker's clear, or the taker's second look sees the
giver's bit. A taker that dies in between leaves free bits that nobody finds until recovery rebuilds
the pool: lost capacity for a while, never a slot that is handed out twice.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport (
    kv_au64,
    kv_u64_cas_acq_rel,
    kv_u64_fetch_and_acq_rel,
    kv_u64_fetch_or_acq_rel,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.layout cimport kv_pool_view, kv_view


cdef extern from *:
    """
    static inline int kv_ctz64(uint64_t x) { return __builtin_ctzll(x); }
    static inline int kv_popcount64(uint64_t x) { return __builtin_popcountll(x); }
    """
    int kv_ctz64(uint64_t x) noexcept nogil
    int kv_popcount64(uint64_t x) noexcept nogil


cdef inline uint64_t run_mask(int start, uint32_t length) noexcept nogil:
    cdef uint64_t ones = 0xFFFFFFFFFFFFFFFFULL if length >= 64 else ((<uint64_t>1) << length) - 1
    return ones << start


cdef uint32_t take_from_word(kv_pool_view *p, uint32_t word_index, uint32_t wanted, uint32_t limit,
                             uint32_t *first) noexcept nogil:
    """Take the first run of at most `wanted` bits below `limit` from one word.

    Its length, 0 if none.
    """
    cdef kv_au64 *word = &p.words[word_index]
    cdef uint64_t bits = kv_u64_load_acquire(word)
    cdef uint64_t usable, mask
    cdef uint32_t base = word_index * 64
    cdef uint32_t length
    cdef int start
    if base >= limit:
        return 0
    while True:  # each retry means that another taker or giver made progress on this word
        usable = bits
        if limit - base < 64:
            usable &= ((<uint64_t>1) << (limit - base)) - 1
        if usable == 0:
            return 0
        start = kv_ctz64(usable)
        length = 64 - start if ~(usable >> start) == 0 else <uint32_t>kv_ctz64(~(usable >> start))
        if length > wanted:
            length = wanted
        mask = run_mask(start, length)
        if kv_u64_cas_acq_rel(word, &bits, bits & ~mask):
            if bits & ~mask == 0:
                kv_u64_fetch_and_acq_rel(&p.summary[word_index // 64],
                                         ~((<uint64_t>1) << (word_index % 64)))
                if kv_u64_load_acquire(word) != 0:
                    kv_u64_fetch_or_acq_rel(&p.summary[word_index // 64],
                                            (<uint64_t>1) << (word_index % 64))
            first[0] = base + <uint32_t>start
            return length


cdef uint32_t pool_take_run(kv_view *view, int pool, uint32_t wanted, uint32_t limit,
                            PoolCursor *cursor, uint32_t *first) noexcept nogil:
    """Take up to `wanted` neighbouring free indices below `limit`.

    Returns how many were taken, starting at `first`; 0 when nothing is free. Looks at each summary
    word once, so the work is bounded by capacity / 4096 words plus the words that the summary
    names.
    """
    cdef kv_pool_view *p = &view.pool[pool]
    cdef uint32_t looked, summary_index, word_index, length
    cdef uint64_t hints
    if limit > p.capacity:
        limit = p.capacity
    if limit == 0 or wanted == 0:
        return 0
    if cursor.word_index < p.word_count:
        length = take_from_word(p, cursor.word_index, wanted, limit, first)
        if length != 0:
            return length
    for looked in range(p.summary_count):
        summary_index = (cursor.word_index // 64 + looked) % p.summary_count
        hints = kv_u64_load_acquire(&p.summary[summary_index])
        while hints != 0:
            word_index = summary_index * 64 + <uint32_t>kv_ctz64(hints)
            hints &= hints - 1
            if word_index >= p.word_count:
                break
            length = take_from_word(p, word_index, wanted, limit, first)
            if length != 0:
                cursor.word_index = word_index
                return length
    return 0


cdef bint pool_take_one(kv_view *view, int pool, uint32_t index) noexcept nogil:
    """Take one index; False if it is not free. Its summary bit may stay: it is a hint."""
    cdef kv_pool_view *p = &view.pool[pool]
    cdef uint64_t bit = (<uint64_t>1) << (index % 64)
    if index >= p.capacity:
        return False
    return kv_u64_fetch_and_acq_rel(&p.words[index // 64], ~bit) & bit != 0


cdef void pool_give_back(kv_view *view, int pool, uint32_t index) noexcept nogil:
    """Mark `index` free; KV_NONE and what else is beyond the end is passed over.

    The caller is the only one that knows it: it took it, or evicted its block. Only who makes a
    word other than 0 sets its hint, so that leaders which give back neighbours do not fight for
    the summary's line. A taker that clears the hint looks at the word again afterwards, so a hint
    is missing no longer than one of the two takes.
    """
    cdef kv_pool_view *p = &view.pool[pool]
    cdef uint32_t word_index = index // 64
    if index >= p.capacity:
        return
    if kv_u64_fetch_or_acq_rel(&p.words[word_index], (<uint64_t>1) << (index % 64)) != 0:
        return
    kv_u64_fetch_or_acq_rel(&p.summary[word_index // 64], (<uint64_t>1) << (word_index % 64))


cdef bint pool_has_bit(kv_view *view, int pool, uint32_t index) noexcept nogil:
    cdef kv_pool_view *p = &view.pool[pool]
    return (kv_u64_load_relaxed(&p.words[index // 64]) >> (index % 64)) & 1


cdef void pool_set_word(kv_view *view, int pool, uint32_t word_index, uint64_t bits) noexcept nogil:
    """Set a whole word and its hint: for the creator, and for recovery while nobody is inside."""
    cdef kv_pool_view *p = &view.pool[pool]
    kv_u64_store_release(&p.words[word_index], bits)
    if bits != 0:
        kv_u64_fetch_or_acq_rel(&p.summary[word_index // 64], (<uint64_t>1) << (word_index % 64))


cdef void pool_fill(kv_view *view, int pool) noexcept nogil:
    """Everything is free: for the creator of a segment, before anyone can see it."""
    cdef kv_pool_view *p = &view.pool[pool]
    cdef uint32_t i, rest
    for i in range(p.word_count):
        rest = p.capacity - i * 64
        pool_set_word(view, pool, i, run_mask(0, 64 if rest > 64 else rest))


cdef uint64_t pool_free_count(kv_view *view, int pool) noexcept nogil:
    """How many are free, counted; a moving target while others work."""
    cdef kv_pool_view *p = &view.pool[pool]
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(p.word_count):
        total += <uint64_t>kv_popcount64(kv_u64_load_relaxed(&p.words[i]))
    return total
