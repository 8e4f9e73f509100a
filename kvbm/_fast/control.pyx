# SPDX-License-Identifier: Apache-2.0
"""What a controller and the block API do beyond a leader's normal work.

Counting and finding look at every block once; they are for people and tools, not for the path of a
request. Nothing here waits, and none of it adds a step to the protocol of layout.h: an eviction is
`block_evict`, and a block that is reserved but not published gets its identity while it belongs to
nobody but its owner.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from kvbm._fast.atomics cimport (
    kv_u32_load_relaxed,
    kv_u32_store_relaxed,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.blocks cimport block_evict, structure_enter, structure_exit
from kvbm._fast.index cimport INSERTED, index_delete, index_insert
from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport (
    KV_C_EVICTED,
    KV_C_EVICTED_CLEARED,
    KV_C_INDEX_FULL,
    KV_EMPTY,
    KV_HOLDERS_MASK,
    KV_NONE,
    KV_PARTIAL,
    KV_POOL_BLOCKS,
    KV_POOL_HOST,
    KV_REGISTERED,
    KV_TIER_DISK,
    KV_TIER_HOST,
    kv_block,
    kv_block_cold,
    kv_count,
    kv_holder_bit,
    kv_placement_state_of,
    kv_recency_make,
    kv_view,
    kv_word_children,
    kv_word_generation,
    kv_word_state,
)
from kvbm._fast.pool cimport pool_give_back
from kvbm._fast.segment cimport Segment
from kvbm._fast.table cimport BlockTable, make_ref

from typing import NamedTuple

TIERS = {"host": KV_TIER_HOST, "disk": KV_TIER_DISK}

cdef enum:                       # of a block, in a walk over the tree
    UNKNOWN = 0
    OUTSIDE = 1
    INSIDE = 2


class Census(NamedTuple):
    """How many slots of a tier are in which use, at about one moment.

    Attributes
    ----------
    total : int
        Slots of the tier.
    filling : int
        Reserved by a leader, not published yet.
    active : int
        Registered and held, or an ancestor of a block that is held or being filled.
    inactive : int
        Registered and evictable.
    """

    total: int
    filling: int
    active: int
    inactive: int

    @property
    def empty(self) -> int:
        """Slots that hold nothing."""
        return max(0, self.total - self.filling - self.active - self.inactive)


cdef uint32_t parent_of(kv_view *view, uint32_t block) noexcept nogil:
    """Parent of a block if it is still the one that the block names, else KV_NONE."""
    cdef uint32_t parent = kv_u32_load_relaxed(&view.blocks[block].parent)
    if parent == 0 or parent > view.shape.block_capacity:
        return KV_NONE
    if (kv_word_generation(kv_u64_load_acquire(&view.blocks[parent - 1].word))
            != kv_u32_load_relaxed(&view.blocks[block].parent_generation)):
        return KV_NONE
    return parent - 1


cdef void mark_active(kv_view *view, uint8_t *marks) noexcept nogil:
    """Mark every block that is held or being filled, and its ancestors: each at most once."""
    cdef uint32_t i, block
    cdef uint64_t word
    for i in range(view.shape.block_capacity):
        word = kv_u64_load_acquire(&view.blocks[i].word)
        if kv_word_state(word) != KV_PARTIAL and (
                kv_word_state(word) != KV_REGISTERED or word & KV_HOLDERS_MASK == 0):
            continue
        block = i
        while block != KV_NONE and not marks[block]:
            marks[block] = 1
            block = parent_of(view, block)


def census(Segment segment not None, tier: str) -> Census:
    """Count the slots of a tier, "host" or "disk", by their use.

    Everything is counted once while others may be working, so the numbers of a busy segment are
    approximate.

    Raises
    ------
    KeyError
        There is no such tier.
    """
    cdef int t = TIERS[tier]
    cdef uint32_t i
    cdef uint64_t word, filling = 0, active = 0, inactive = 0
    cdef kv_view *view = &segment.view
    cdef uint8_t *marks
    segment.check_open()
    marks = <uint8_t *>calloc(view.shape.block_capacity + 1, 1)
    if marks == NULL:
        raise MemoryError("no memory for a mark of each block")
    with nogil:
        mark_active(view, marks)
        for i in range(view.shape.block_capacity):
            if (kv_placement_state_of(kv_u64_load_acquire(&view.blocks[i].placement[t]))
                    == KV_EMPTY):
                continue
            word = kv_u64_load_acquire(&view.blocks[i].word)
            if kv_word_state(word) == KV_PARTIAL:
                filling += 1
            elif kv_word_state(word) == KV_REGISTERED:
                active += marks[i] != 0
                inactive += marks[i] == 0
        free(marks)
    total = view.shape.host_slots if t == KV_TIER_HOST else view.shape.disk_slots
    return Census(total, filling, active, inactive)


cdef bint among(const uint64_t *values, Py_ssize_t count, uint64_t value) noexcept nogil:
    """True if an ascending array has this value."""
    cdef Py_ssize_t low = 0, high = count, middle
    while low < high:
        middle = (low + high) // 2
        if values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low < count and values[low] == value


def find_registered(Segment segment not None, sequence_hashes: list[int]) -> dict[int, list[int]]:
    """References to the registered blocks that carry these sequence hashes.

    A sequence hash is 64 bits and no proof of identity: several blocks may carry one. Hashes that
    no block carries are left out.
    """
    cdef list wanted = sorted(set(sequence_hashes))
    cdef Py_ssize_t count = len(wanted), k
    cdef uint32_t i
    cdef uint64_t word, value
    cdef kv_view *view = &segment.view
    cdef uint64_t *values
    found: dict[int, list[int]] = {}
    segment.check_open()
    values = <uint64_t *>malloc((count + 1) * sizeof(uint64_t))
    if values == NULL:
        raise MemoryError(f"no memory for {count} hashes")
    try:
        for k in range(count):
            values[k] = wanted[k]
        for i in range(view.shape.block_capacity):
            word = kv_u64_load_acquire(&view.blocks[i].word)
            if kv_word_state(word) != KV_REGISTERED:
                continue
            value = kv_u64_load_relaxed(&view.cold[i].sequence_hash)
            if among(values, count, value):
                found.setdefault(value, []).append(make_ref(i, kv_word_generation(word)))
    finally:
        free(values)
    return found


cdef void mark_subtrees(kv_view *view, uint8_t *marks) noexcept nogil:
    """Extend INSIDE from marked blocks to their registered descendants; the rest is OUTSIDE."""
    cdef uint32_t i, block
    cdef uint8_t answer
    for i in range(view.shape.block_capacity):
        if kv_word_state(kv_u64_load_acquire(&view.blocks[i].word)) != KV_REGISTERED:
            continue
        block = i
        while block != KV_NONE and marks[block] == UNKNOWN:
            marks[block] = OUTSIDE  # for the moment: a damaged chain that is a circle ends here
            block = parent_of(view, block)
        answer = OUTSIDE if block == KV_NONE else marks[block]
        block = i
        while answer == INSIDE and block != KV_NONE and marks[block] == OUTSIDE:
            marks[block] = INSIDE
            block = parent_of(view, block)


def evict_subtrees(BlockTable table not None, refs: list[int]) -> int:
    """Evict blocks that nobody holds, with all their descendants; returns how many blocks went.

    A block of which a descendant is held or being filled stays, and so does what is below it
    unless it was named itself. Leaves go first, so the tree stays prefix-closed at every moment.
    """
    cdef kv_view *view = table.view
    cdef uint32_t i, block
    cdef uint64_t word, ref
    cdef uint8_t *active
    cdef uint8_t *doomed
    cdef int evicted = 0
    table.segment.check_open()
    active = <uint8_t *>calloc(view.shape.block_capacity + 1, 1)
    doomed = <uint8_t *>calloc(view.shape.block_capacity + 1, 1)
    try:
        if active == NULL or doomed == NULL:
            raise MemoryError("no memory for the marks of each block")
        mark_active(view, active)
        for ref in refs:
            table.check_ref(ref)
            block = <uint32_t>ref
            word = kv_u64_load_acquire(&view.blocks[block].word)
            if (not active[block] and kv_word_state(word) == KV_REGISTERED
                    and kv_word_generation(word) == <uint32_t>(ref >> 32)):
                doomed[block] = INSIDE
        mark_subtrees(view, doomed)
        for i in range(view.shape.block_capacity):
            block = i
            while block != KV_NONE and doomed[block] == INSIDE:  # a leaf, then what it leaves bare
                block = evict_one(view, block, &evicted)
    finally:
        free(active)
        free(doomed)
    return evicted


cdef uint32_t evict_one(kv_view *view, uint32_t block, int *evicted) noexcept nogil:
    """Evict a block if nothing holds it and nothing depends on it; its parent, or KV_NONE."""
    cdef uint32_t slot = KV_NONE, parent = KV_NONE
    cdef uint64_t word = kv_u64_load_acquire(&view.blocks[block].word)
    if (kv_word_state(word) != KV_REGISTERED or word & KV_HOLDERS_MASK != 0
            or kv_word_children(word) != 0 or not structure_enter(view)):
        return KV_NONE
    if block_evict(view, block, word, &slot, &parent):
        pool_give_back(view, KV_POOL_BLOCKS, block)
        if slot != KV_NONE:
            pool_give_back(view, KV_POOL_HOST, slot)
        kv_count(view, KV_C_EVICTED, 1)
        kv_count(view, KV_C_EVICTED_CLEARED, 1)
        evicted[0] += 1
    structure_exit(view)
    return parent


def identify(BlockTable table not None, ref: int, Keys keys not None, index: int,
             parent: int | None = None, priority: int = 0) -> bool:
    """Give a block that this leader has reserved the identity that it is to be published under.

    For callers that reserve memory before they know what will be in it: such a block is reserved
    under a random digest, which nobody looks for. Its owner is the only one who writes it while it
    is PARTIAL, and it cannot be matched before it is published, so a reader that meets the change
    half done sees a digest that is nobody's. Once it has its name, stores of others find it and
    name it as the parent of their blocks, so a reservation is named once: again only with the same
    digest.

    Parameters
    ----------
    ref : int
        Reserved by this leader and not published.
    keys, index : Keys, int
        Where the digest and the sequence hash are.
    parent : int or None
        Reference to the block before it, held; None for a root.
    priority : int
        For the order of eviction.

    Returns
    -------
    bool
        False if a recovery is under way (try again) or the index has no room.

    Raises
    ------
    LookupError
        The block is not reserved by this leader under this generation.
    """
    cdef kv_view *view = table.view
    cdef uint32_t block = <uint32_t>(ref & 0xFFFFFFFF)
    cdef kv_block *b
    cdef kv_block_cold *cold
    cdef uint64_t word, lo, hi, sequence_hash
    cdef uint32_t position = 0
    cdef bint done
    table.check_ref(ref)
    if parent is not None:
        table.check_ref(parent)
        position = kv_u32_load_relaxed(&view.cold[<uint32_t>(parent & 0xFFFFFFFF)].position) + 1
    table.mix(keys)
    if not 0 <= index < len(keys):
        raise IndexError(f"block {index}: there are {len(keys)} keys")
    keys.digest(index, &lo, &hi)
    sequence_hash = keys.sequence_hash(index)
    b = &view.blocks[block]
    cold = &view.cold[block]
    word = kv_u64_load_acquire(&b.word)
    if (kv_word_state(word) != KV_PARTIAL or kv_word_generation(word) != <uint32_t>(ref >> 32)
            or word & kv_holder_bit(view.leader) == 0):
        raise LookupError(f"block {block} is not reserved by this leader")
    if not structure_enter(view):
        return False
    index_delete(view, kv_u64_load_relaxed(&b.digest_lo), kv_u64_load_relaxed(&b.digest_hi), block)
    kv_u64_store_release(&b.digest_lo, lo)
    kv_u64_store_release(&b.digest_hi, hi)
    kv_u32_store_relaxed(&b.parent, 0 if parent is None else <uint32_t>(parent & 0xFFFFFFFF) + 1)
    kv_u32_store_relaxed(&b.parent_generation, 0 if parent is None else <uint32_t>(parent >> 32))
    kv_u64_store_relaxed(
        &b.recency, kv_recency_make(priority, kv_u64_load_relaxed(&view.header.tick)))
    kv_u64_store_relaxed(&cold.sequence_hash, sequence_hash)
    kv_u32_store_relaxed(&cold.position, position)
    kv_u32_store_relaxed(&cold.group, keys.group)
    done = index_insert(view, lo, hi, block, False) == INSERTED
    if not done:
        kv_count(view, KV_C_INDEX_FULL, 1)
    structure_exit(view)
    return done
