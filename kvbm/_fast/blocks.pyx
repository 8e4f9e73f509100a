# SPDX-License-Identifier: Apache-2.0
"""The life of a block: reserve, publish, pin, unpin, evict, abandon.

States, transitions and invariants are written down in layout.h; the labels [P1], [E1], ... here are
the ones used there and in the model. Each function makes one transition. Functions that change the
structure (reserve, publish, evict, abandon) are called between `structure_enter` and
`structure_exit`; pins and unpins need neither.
"""
from libc.stdint cimport uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvbm._fast.atomics cimport (
    kv_au32,
    kv_prefetch,
    kv_u32_load_relaxed,
    kv_u32_load_seq_cst,
    kv_u32_store_relaxed,
    kv_u32_store_release,
    kv_u32_store_seq_cst,
    kv_u64_cas_acq_rel,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.index cimport FULL, INSERTED, InsertResult, index_delete, index_insert
from kvbm._fast.layout cimport (
    KV_C_DECLINED,
    KV_C_INDEX_FULL,
    KV_CHILD_ONE,
    KV_CHILDREN_MAX,
    KV_EMPTY,
    KV_EVICTING,
    KV_FILLING,
    KV_HOLDERS_MASK,
    KV_NONE,
    KV_PARTIAL,
    KV_POOL_DISK,
    KV_READY,
    KV_REGISTERED,
    KV_RESET,
    KV_TIER_DISK,
    KV_TIER_HOST,
    KV_TIERS,
    kv_block,
    kv_block_cold,
    kv_count,
    kv_holder_bit,
    kv_placement_generation,
    kv_placement_make,
    kv_placement_slot,
    kv_placement_state_of,
    kv_recency_make,
    kv_recency_priority,
    kv_recency_tick,
    kv_view,
    kv_word_children,
    kv_word_generation,
    kv_word_make,
    kv_word_state,
)
from kvbm._fast.pool cimport pool_give_back


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef void block_prefetch(kv_view *view, uint32_t block) noexcept nogil:
    """Ask for both lines of a block that will be reserved or evicted soon."""
    kv_prefetch(&view.blocks[block])
    kv_prefetch(&view.cold[block])


cdef bint structure_enter(kv_view *view) noexcept nogil:
    """Show that this participant changes the structure.

    False while a recovery is under way (then decline).
    """
    kv_u32_store_seq_cst(&view.participants[view.self].inside, 1)   # [S0]
    if kv_u32_load_seq_cst(&view.header.recovering) != 0:           # [S1]
        kv_u32_store_release(&view.participants[view.self].inside, 0)
        kv_count(view, KV_C_DECLINED, 1)
        return False
    return True


cdef void structure_exit(kv_view *view) noexcept nogil:
    # Release: whoever sees 0 here ([S3], acquire by its sequential consistency) sees all that was
    # changed.
    kv_u32_store_release(&view.participants[view.self].inside, 0)


cdef bint block_pin(kv_view *view, uint32_t block, uint64_t lo, uint64_t hi) noexcept nogil:
    """Hold a registered block for this leader.

    False if it is not registered under this digest any more.


    The digest is compared after the CAS: from then on the block cannot be evicted, so the
    comparison is exact whatever happened before.
    """
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t bit = kv_holder_bit(view.leader)
    cdef uint64_t word = kv_u64_load_acquire(&b.word)
    while True:  # each retry means that another participant changed this block's word
        if kv_word_state(word) != KV_REGISTERED:
            return False
        if kv_u64_cas_acq_rel(&b.word, &word, word | bit):
            break
    if kv_u64_load_acquire(&b.digest_lo) == lo and kv_u64_load_acquire(&b.digest_hi) == hi:
        return True
    if word & bit == 0:  # it was another block by now; take back only what this call added
        clear_holder(view, block)
    return False


cdef void clear_holder(kv_view *view, uint32_t block) noexcept nogil:
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t bit = kv_holder_bit(view.leader)
    cdef uint64_t word = kv_u64_load_acquire(&b.word)
    while word & bit != 0 and kv_word_state(word) == KV_REGISTERED:
        if kv_u64_cas_acq_rel(&b.word, &word, word & ~bit):
            return


cdef void block_unpin(kv_view *view, uint32_t block, uint64_t tick) noexcept nogil:
    """Let go of a block and make it the most recently returned one.

    The recency is written before the bit is cleared, so whoever finds the block evictable sees it.
    """
    cdef kv_block *b = &view.blocks[block]
    cdef uint32_t priority = kv_recency_priority(kv_u64_load_relaxed(&b.recency))
    kv_u64_store_relaxed(&b.recency, kv_recency_make(priority, tick))
    clear_holder(view, block)


cdef void block_used(kv_view *view, uint32_t block) noexcept nogil:
    """A match has ended at a block that this leader holds.

    No read-modify-write, which would wait for a cache line that is rarely near: two leaders at once
    may count as one.
    """
    cdef kv_au32 *uses = &view.cold[block].uses
    kv_u32_store_relaxed(uses, kv_u32_load_relaxed(uses) + 1)


cdef bint block_reserve(kv_view *view, uint32_t block, uint32_t slot, const Reservation *what,
                        uint32_t *generation) noexcept nogil:
    """RESET -> PARTIAL: this leader will fill `block`, whose bytes go to `slot`.

    The caller owns the record and the slot (it took them from their pools, or evicted them). False,
    with the block back in RESET, when another block got this digest meanwhile, or the index has no
    room.
    """
    cdef kv_block *b = &view.blocks[block]
    cdef kv_block_cold *cold = &view.cold[block]
    cdef uint64_t word = kv_u64_load_acquire(&b.word)
    cdef uint32_t ignored = 0
    cdef InsertResult inserted
    generation[0] = kv_word_generation(word)
    if kv_word_state(word) != KV_RESET:
        return False  # only a damaged segment gets here: two owners of one record
    # What identifies the block is written while it is still RESET and private to the caller: a
    # look-up that sees PARTIAL must not see the digest of the block that was here before.
    kv_u64_store_release(&b.digest_lo, what.digest_lo)  # [D0]
    kv_u64_store_release(&b.digest_hi, what.digest_hi)
    kv_u32_store_relaxed(&b.parent, 0 if what.parent == KV_NONE else what.parent + 1)
    kv_u32_store_relaxed(&b.parent_generation, what.parent_generation)
    kv_u64_store_relaxed(&b.recency,
                         kv_recency_make(what.priority, what.tick))
    kv_u64_store_relaxed(&cold.sequence_hash, what.sequence_hash)
    kv_u32_store_relaxed(&cold.position, what.position)
    kv_u32_store_relaxed(&cold.group, what.group)
    kv_u32_store_relaxed(&cold.uses, 0)
    if not kv_u64_cas_acq_rel(&b.word, &word, kv_word_make(
            KV_PARTIAL, <uint32_t>1 << view.leader, 0, generation[0])):
        return False
    kv_u64_store_release(&b.placement[KV_TIER_HOST],
                         kv_placement_make(KV_FILLING, generation[0], slot))
    inserted = index_insert(view, what.digest_lo, what.digest_hi, block, True)
    if inserted == INSERTED:
        return True
    kv_count(view, KV_C_INDEX_FULL, inserted == FULL)
    block_abandon(view, block, generation[0], &ignored)
    return False


cdef bint count_on_parent(kv_view *view, uint32_t parent, uint32_t generation) noexcept nogil:
    """[P1] children + 1 on the parent.

    False if it is not registered under this generation, or full.
    """
    cdef kv_block *p = &view.blocks[parent]
    cdef uint64_t word = kv_u64_load_acquire(&p.word)
    while True:
        if (kv_word_state(word) != KV_REGISTERED or kv_word_generation(word) != generation
                or kv_word_children(word) == KV_CHILDREN_MAX):
            return False
        if kv_u64_cas_acq_rel(&p.word, &word, word + KV_CHILD_ONE):
            return True


cdef void uncount_on_parent(kv_view *view, uint32_t parent, uint32_t generation) noexcept nogil:
    """[E2] children - 1 on the parent.

    The count itself has kept the parent registered until now.
    """
    cdef kv_block *p = &view.blocks[parent]
    cdef uint64_t word = kv_u64_load_acquire(&p.word)
    while True:
        if kv_word_generation(word) != generation or kv_word_children(word) == 0:
            return  # only a damaged segment gets here
        if kv_u64_cas_acq_rel(&p.word, &word, word - KV_CHILD_ONE):
            return


cdef PublishResult block_publish(kv_view *view, uint32_t block, uint32_t generation,
                                 uint64_t now_ns) noexcept nogil:
    """PARTIAL -> REGISTERED, after the parent has been counted.

    May run twice, and from two processes at once.
    """
    cdef kv_block *b
    cdef uint64_t word, filling
    cdef uint32_t parent, parent_generation
    if block >= view.shape.block_capacity:
        return GONE
    b = &view.blocks[block]
    word = kv_u64_load_acquire(&b.word)
    if kv_word_generation(word) != generation:
        return GONE
    if kv_word_state(word) != KV_PARTIAL:
        return ALREADY if kv_word_state(word) == KV_REGISTERED else GONE
    parent = kv_u32_load_relaxed(&b.parent)
    parent_generation = kv_u32_load_relaxed(&b.parent_generation)
    if parent > view.shape.block_capacity:
        return GONE
    if parent != 0 and not count_on_parent(view, parent - 1, parent_generation):  # [P1]
        return NO_PARENT
    filling = kv_u64_load_acquire(&b.placement[KV_TIER_HOST])
    if (kv_placement_state_of(filling) == KV_FILLING
            and kv_placement_generation(filling) == generation):
        kv_u64_cas_acq_rel(&b.placement[KV_TIER_HOST], &filling,
                           kv_placement_make(KV_READY, generation, kv_placement_slot(filling)))
    kv_u64_store_relaxed(&view.cold[block].registered_ns, now_ns)
    while kv_word_state(word) == KV_PARTIAL and kv_word_generation(word) == generation:
        if kv_u64_cas_acq_rel(&b.word, &word,  # [P2]
                              (word & KV_HOLDERS_MASK)
                              | kv_word_make(KV_REGISTERED, 0, 0, generation)):
            return PUBLISHED
    if parent != 0:
        uncount_on_parent(view, parent - 1, parent_generation)
    if kv_word_state(word) == KV_REGISTERED and kv_word_generation(word) == generation:
        return ALREADY
    return GONE


cdef bint block_evict(kv_view *view, uint32_t block, uint64_t expected, uint32_t *host_slot,
                      uint32_t *parent) noexcept nogil:
    """REGISTERED -> EVICTING -> RESET.

    `expected` is a word with no holder and no child; False if it has moved.


    On success the caller owns the record and `host_slot` (KV_NONE if it had none); `parent` may
    have become evictable (KV_NONE for a root). The parent inherits the recency, so that a chain
    ages as a whole: it counts as returned when it was last matched as far as here.
    """
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t moved = kv_word_make(KV_EVICTING, <uint32_t>1 << view.leader, 0,
                                       kv_word_generation(expected) + 1)
    cdef uint32_t p = kv_u32_load_relaxed(&b.parent)
    if not kv_u64_cas_acq_rel(&b.word, &expected, moved):  # [E1]
        return False
    parent[0] = KV_NONE if p == 0 or p > view.shape.block_capacity else p - 1
    block_leave(view, block, True, host_slot)
    return True


cdef bint block_abandon(kv_view *view, uint32_t block, uint32_t generation,
                        uint32_t *host_slot) noexcept nogil:
    """PARTIAL -> EVICTING -> RESET: the bytes did not arrive.

    False if it is not reserved any more.
    """
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t word = kv_u64_load_acquire(&b.word)
    while kv_word_state(word) == KV_PARTIAL and kv_word_generation(word) == generation:
        if kv_u64_cas_acq_rel(&b.word, &word,
                              kv_word_make(KV_EVICTING, <uint32_t>1 << view.leader, 0,
                                           generation + 1)):
            block_leave(view, block, False, host_slot)
            return True
    return False


cdef void inherit_tick(kv_block *parent, uint64_t tick) noexcept nogil:
    """The parent's tick becomes the later of its own and its child's.

    Its priority stays its own.
    """
    cdef uint64_t recency = kv_u64_load_relaxed(&parent.recency)
    if kv_recency_tick(recency) < tick:
        kv_u64_store_relaxed(&parent.recency, kv_recency_make(kv_recency_priority(recency), tick))


cdef void block_leave(kv_view *view, uint32_t block, bint uncount_parent,
                      uint32_t *host_slot) noexcept nogil:
    """The rest of an eviction, from [E2] on; the block is EVICTING and owned by the caller."""
    cdef kv_block *b = &view.blocks[block]
    cdef uint32_t parent = kv_u32_load_relaxed(&b.parent)
    cdef uint64_t placement, word
    cdef int tier
    if uncount_parent and parent != 0 and parent <= view.shape.block_capacity:
        inherit_tick(&view.blocks[parent - 1], kv_recency_tick(kv_u64_load_relaxed(&b.recency)))
        uncount_on_parent(view, parent - 1, kv_u32_load_relaxed(&b.parent_generation))  # [E2]
    index_delete(view, kv_u64_load_relaxed(&b.digest_lo),  # [E3]
                 kv_u64_load_relaxed(&b.digest_hi), block)
    host_slot[0] = KV_NONE
    for tier in range(KV_TIERS):  # [E4]
        placement = kv_u64_load_acquire(&b.placement[tier])
        if kv_placement_state_of(placement) == KV_EMPTY:
            continue
        kv_u64_store_release(&b.placement[tier], 0)
        if tier == KV_TIER_HOST and kv_placement_slot(placement) < view.shape.host_slots:
            host_slot[0] = kv_placement_slot(placement)
        elif tier == KV_TIER_DISK:
            pool_give_back(view, KV_POOL_DISK, kv_placement_slot(placement))
    word = kv_u64_load_acquire(&b.word)
    kv_u64_store_release(&b.word, kv_word_make(KV_RESET, 0, 0, kv_word_generation(word)))  # [E5]


cdef bint chain_step(kv_view *view, uint32_t *block, uint32_t *generation,
                     uint32_t *slot) noexcept nogil:
    """Slot of a block of a held chain, then move to its parent; False if the chain is broken here.

    A root leaves `block` at KV_NONE, so that a further step is False.
    """
    cdef kv_block *b
    cdef uint64_t word, placement
    cdef uint32_t parent
    if block[0] >= view.shape.block_capacity:
        return False
    b = &view.blocks[block[0]]
    word = kv_u64_load_acquire(&b.word)
    placement = kv_u64_load_acquire(&b.placement[KV_TIER_HOST])
    if (kv_word_state(word) != KV_REGISTERED or kv_word_generation(word) != generation[0]
            or kv_placement_state_of(placement) != KV_READY
            or kv_placement_generation(placement) != generation[0]
            or kv_placement_slot(placement) >= view.shape.host_slots):
        return False
    slot[0] = kv_placement_slot(placement)
    parent = kv_u32_load_relaxed(&b.parent)
    generation[0] = kv_u32_load_relaxed(&b.parent_generation)
    block[0] = KV_NONE if parent == 0 else parent - 1
    return True
