# SPDX-License-Identifier: Apache-2.0
"""Digest -> block: cache-line buckets of eight hints, two candidate buckets a digest.

An entry is `tag << 32 | block + 1`, 0 is empty. Insert and delete are one CAS on one entry. Nothing
is believed because it stands here: `index_find` compares the block's own digest between two reads
of its word, so an entry that has become wrong costs a miss. At the usual load (half of the entries
or less) a digest that finds both its buckets full of live entries is practically impossible (two
choices, eight entries a bucket); if it happens the block is not stored and the counter `index_full`
says so.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport kv_au64, kv_prefetch, kv_u64_cas_acq_rel, kv_u64_load_acquire
from kvbm._fast.layout cimport (
    KV_BUCKET_ENTRIES,
    KV_C_STALE_ENTRIES,
    KV_NONE,
    KV_PARTIAL,
    KV_REGISTERED,
    kv_block,
    kv_count,
    kv_digest_hash,
    kv_hash_bucket,
    kv_hash_tag,
    kv_other_bucket,
    kv_view,
    kv_word_generation,
    kv_word_state,
)


cdef inline bint block_has_digest(kv_view *view, uint32_t block, uint64_t lo, uint64_t hi,
                                  bint partial_too, uint64_t *word) noexcept nogil:
    """True if `block` carried this digest in a live state at one moment.

    `word` is its word at that moment.
    """
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t before = kv_u64_load_acquire(&b.word)
    cdef uint64_t after
    cdef uint32_t state = kv_word_state(before)
    if state != KV_REGISTERED and not (partial_too and state == KV_PARTIAL):
        return False
    if kv_u64_load_acquire(&b.digest_lo) != lo or kv_u64_load_acquire(&b.digest_hi) != hi:  # [D1]
        return False
    after = kv_u64_load_acquire(&b.word)  # [D2]
    if kv_word_generation(after) != kv_word_generation(before):
        return False
    state = kv_word_state(after)
    if state != KV_REGISTERED and not (partial_too and state == KV_PARTIAL):
        return False
    word[0] = after
    return True


cdef uint32_t index_find(kv_view *view, uint64_t lo, uint64_t hi, bint partial_too,
                         uint64_t *word) noexcept nogil:
    """A block that carries this digest and is registered (or, if asked, being filled).

    KV_NONE if there is none.

    A registered block is preferred to one that is being filled. `word` is the block's word as it
    was verified. Sixteen entries at most are looked at.
    """
    cdef uint64_t h = kv_digest_hash(lo, hi)
    cdef uint32_t tag = kv_hash_tag(h)
    cdef uint32_t bucket = kv_hash_bucket(h, view.bucket_mask)
    cdef uint32_t block, found = KV_NONE
    cdef uint64_t entry, seen = 0
    cdef int _choice, i
    for _choice in range(2):
        for i in range(KV_BUCKET_ENTRIES):
            entry = kv_u64_load_acquire(&view.buckets[bucket].entry[i])
            if entry == 0 or <uint32_t>(entry >> 32) != tag:
                continue
            block = <uint32_t>entry - 1
            if block >= view.shape.block_capacity:
                continue
            if block_has_digest(view, block, lo, hi, partial_too, &seen):
                word[0] = seen
                if kv_word_state(seen) == KV_REGISTERED:
                    return block
                found = block
        bucket = kv_other_bucket(bucket, tag, view.bucket_mask)
    return found


cdef inline bint entry_is_stale(kv_view *view, uint64_t entry) noexcept nogil:
    """True if the block that an entry names cannot be what the entry was made for."""
    cdef uint32_t block = <uint32_t>entry - 1
    cdef uint32_t state
    cdef kv_block *b
    if block >= view.shape.block_capacity:
        return True
    b = &view.blocks[block]
    state = kv_word_state(kv_u64_load_acquire(&b.word))
    if state != KV_REGISTERED and state != KV_PARTIAL:
        return True
    return kv_hash_tag(kv_digest_hash(kv_u64_load_acquire(&b.digest_lo),
                                      kv_u64_load_acquire(&b.digest_hi))) != <uint32_t>(entry >> 32)


cdef inline bint entry_has_digest(kv_view *view, uint64_t entry, uint32_t tag, uint64_t lo,
                                  uint64_t hi, uint32_t block) noexcept nogil:
    """True if an entry leads to another block than `block` that carries this digest now."""
    cdef uint64_t word
    cdef uint32_t other = <uint32_t>entry - 1
    if <uint32_t>(entry >> 32) != tag or other == block or other >= view.shape.block_capacity:
        return False
    return block_has_digest(view, other, lo, hi, True, &word)


cdef InsertResult index_insert(kv_view *view, uint64_t lo, uint64_t hi, uint32_t block,
                               bint alone) noexcept nogil:
    """Add a hint for `block`; FULL when both buckets are full of live entries.

    The emptier bucket is tried first. A stale entry is replaced only when neither bucket has room.

    With `alone`, TAKEN when another block carries the digest already. Of two that insert one digest
    at once, both see the buckets without it and try the same place, so that one of them loses its
    CAS to the other's entry, and sees that. Only if a third insert, of another digest, comes
    between their looks at the two buckets may they choose different ones: then both blocks stay.
    """
    cdef uint64_t h = kv_digest_hash(lo, hi)
    cdef uint32_t tag = kv_hash_tag(h)
    cdef uint32_t first = kv_hash_bucket(h, view.bucket_mask)
    cdef uint32_t second = kv_other_bucket(first, tag, view.bucket_mask)
    cdef uint64_t entry = (<uint64_t>tag << 32) | (<uint64_t>block + 1)
    cdef uint64_t seen, other
    cdef uint32_t bucket
    cdef kv_au64 *place
    cdef int choice, i, used_first = 0, used_second = 0
    for i in range(KV_BUCKET_ENTRIES):
        seen = kv_u64_load_acquire(&view.buckets[first].entry[i])
        other = kv_u64_load_acquire(&view.buckets[second].entry[i])
        used_first += seen != 0
        used_second += other != 0
        if alone and (entry_has_digest(view, seen, tag, lo, hi, block)
                      or entry_has_digest(view, other, tag, lo, hi, block)):
            return TAKEN
    if used_second < used_first:
        first, second = second, first
    for choice in range(4):  # two buckets for an empty place, then two for a stale one
        bucket = first if choice % 2 == 0 else second
        for i in range(KV_BUCKET_ENTRIES):
            place = &view.buckets[bucket].entry[i]
            seen = kv_u64_load_acquire(place)
            if seen != 0:
                if choice < 2 or not entry_is_stale(view, seen):
                    continue
                kv_count(view, KV_C_STALE_ENTRIES, 1)
            if kv_u64_cas_acq_rel(place, &seen, entry):
                return INSERTED
            if alone and entry_has_digest(view, seen, tag, lo, hi, block):
                return TAKEN
    return FULL


cdef void index_prefetch(kv_view *view, uint64_t lo, uint64_t hi) noexcept nogil:
    """Ask for both buckets of a digest that will be looked up, inserted or deleted soon.

    Buckets are random: without this each step waits for memory, twice.
    """
    cdef uint64_t h = kv_digest_hash(lo, hi)
    cdef uint32_t bucket = kv_hash_bucket(h, view.bucket_mask)
    kv_prefetch(&view.buckets[bucket])
    kv_prefetch(&view.buckets[kv_other_bucket(bucket, kv_hash_tag(h), view.bucket_mask)])


cdef void index_delete(kv_view *view, uint64_t lo, uint64_t hi, uint32_t block) noexcept nogil:
    """Remove the hint for `block` under this digest; nothing happens when there is none.

    There is one: a second, of a process that died, leads to a block without this digest.
    """
    cdef uint64_t h = kv_digest_hash(lo, hi)
    cdef uint32_t tag = kv_hash_tag(h)
    cdef uint32_t bucket = kv_hash_bucket(h, view.bucket_mask)
    cdef uint64_t entry = (<uint64_t>tag << 32) | (<uint64_t>block + 1)
    cdef uint64_t seen
    cdef int _choice, i
    for _choice in range(2):
        for i in range(KV_BUCKET_ENTRIES):
            seen = entry
            if kv_u64_load_acquire(&view.buckets[bucket].entry[i]) == entry:
                kv_u64_cas_acq_rel(&view.buckets[bucket].entry[i], &seen, 0)
                return
        bucket = kv_other_bucket(bucket, tag, view.bucket_mask)


cdef uint64_t index_purge(kv_view *view) noexcept nogil:
    """Delete every stale entry; for recovery. Returns how many there were."""
    cdef uint64_t purged = 0, seen
    cdef uint32_t bucket
    cdef int i
    for bucket in range(view.shape.index_buckets):
        for i in range(KV_BUCKET_ENTRIES):
            seen = kv_u64_load_acquire(&view.buckets[bucket].entry[i])
            if seen != 0 and entry_is_stale(view, seen):
                purged += kv_u64_cas_acq_rel(&view.buckets[bucket].entry[i], &seen, 0)
    return purged
