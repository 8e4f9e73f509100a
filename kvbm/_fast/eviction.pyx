# SPDX-License-Identifier: Apache-2.0
"""Which block to evict: upstream's order, found without a shared list.

The order is (priority, tick of the last return), smallest first, among blocks that nobody holds and
that have no registered child (leaves first). Shared memory has only each block's recency and word;
each leader keeps two private heaps:

* a sweep walks the block table a few blocks a call and gathers the evictable ones that were
  returned before it began; the steps are as long as makes it end shortly before it is needed;
* when `ready` is used up, what was gathered becomes `ready`, and the next sweep begins;
* victims come from `ready` in order. An entry is believed only if generation and recency are still
  what they were; a block that was touched since has a later recency, with which it is offered again
  or left to the next sweep;
* a block that becomes evictable on the way (a parent that lost its last child, a block returned
  with a low priority) is offered to the heaps;
* after a sweep over everything has found nothing, whatever this leader returns goes to `ready` at
  once, so that a table that is full of held blocks is not swept for each of them.

For one leader and one priority this is exact LRU: what was returned before the sweep behind `ready`
began is in `ready`, or comes there when its last child leaves; all else was returned later. A block
returned with a lower priority while a sweep is under way may be found one sweep late. With several
leaders each sees the others' returns and evictions through the blocks themselves, and finds blocks
that others made evictable at its next sweep. Work a call is bounded; the exception is a `ready`
that runs dry before the sweep has ended, which then ends at once.

With a policy of its own a leader asks kvbm/_fast/ranked.pyx instead.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvbm._fast.atomics cimport (
    kv_u32_load_relaxed,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
)
from kvbm._fast.blocks cimport block_evict, block_prefetch, monotonic_ns
from kvbm._fast.index cimport index_prefetch
from kvbm._fast.layout cimport (
    KV_C_EVICTED,
    KV_NONE,
    kv_block,
    kv_count,
    kv_counter,
    kv_recency_tick,
    kv_view,
    kv_word_children,
    kv_word_generation,
)
from kvbm._fast.ranked cimport ranked_advance, ranked_clear, ranked_offer, ranked_take
from kvbm._fast.ranks cimport Ranks

cdef enum:
    SWEEP_STEP_MAX = 256           # bounds what one call costs, when there is little to evict


cdef inline bint before(const Candidate *a, const Candidate *b) noexcept nogil:
    return a.recency < b.recency or (a.recency == b.recency and a.block < b.block)


cdef void heap_push(CandidateHeap *h, Candidate c) noexcept nogil:
    cdef uint32_t i = h.count, parent
    cdef uint64_t bit = (<uint64_t>1) << (c.block % 64)
    if h.present[c.block // 64] & bit != 0:
        return  # with an earlier recency; corrected when it is popped
    h.present[c.block // 64] |= bit
    h.count += 1
    if c.recency > h.recency_max:
        h.recency_max = c.recency
    while i > 0:
        parent = (i - 1) // 2
        if not before(&c, &h.items[parent]):
            break
        h.items[i] = h.items[parent]
        i = parent
    h.items[i] = c


cdef Candidate heap_pop(CandidateHeap *h) noexcept nogil:
    cdef Candidate top = h.items[0]
    cdef Candidate last
    cdef uint32_t i = 0, child
    h.present[top.block // 64] &= ~((<uint64_t>1) << (top.block % 64))
    h.count -= 1
    if h.count == 0:
        return top
    last = h.items[h.count]
    while True:
        child = 2 * i + 1
        if child >= h.count:
            break
        if child + 1 < h.count and before(&h.items[child + 1], &h.items[child]):
            child += 1
        if not before(&h.items[child], &last):
            break
        h.items[i] = h.items[child]
        i = child
    h.items[i] = last
    return top


cdef void heap_clear(CandidateHeap *h, uint32_t capacity) noexcept nogil:
    if h.count != 0:
        memset(h.present, 0, (capacity + 63) // 64 * sizeof(uint64_t))
    h.count = 0
    h.recency_max = 0


cdef bint evictor_init(Evictor *e, uint32_t capacity) noexcept nogil:
    """Memory for a table of `capacity` blocks.

    Pages are touched only when used. False: out of memory.
    """
    e.ready.count = e.gathering.count = 0
    e.ready.items = <Candidate *>calloc(capacity, sizeof(Candidate))
    e.gathering.items = <Candidate *>calloc(capacity, sizeof(Candidate))
    e.ready.present = <uint64_t *>calloc((capacity + 63) // 64, sizeof(uint64_t))
    e.gathering.present = <uint64_t *>calloc((capacity + 63) // 64, sizeof(uint64_t))
    if (e.ready.items == NULL or e.gathering.items == NULL or e.ready.present == NULL
            or e.gathering.present == NULL):
        evictor_free(e)
        return False
    evictor_order_by(e, capacity, NULL)
    return True


cdef void evictor_order_by(Evictor *e, uint32_t capacity, Ranks *ranks) noexcept nogil:
    """Begin anew, by the ranks of a policy or in upstream's order (NULL)."""
    heap_clear(&e.ready, capacity)
    heap_clear(&e.gathering, capacity)
    e.sweep_start_tick = e.ready_start_tick = 0
    e.sweep_seen = e.taken = 0
    e.cursor = 0
    e.sweep_least = SWEEP_STEP_SMALL if capacity <= SMALL_TABLE else SWEEP_STEP_LARGE
    e.sweep_step = e.sweep_least
    e.found_nothing_ns = 0
    e.ranks = ranks
    if ranks != NULL:
        ranked_clear(e)


cdef void evictor_free(Evictor *e) noexcept nogil:
    free(e.ready.items)
    free(e.gathering.items)
    free(e.ready.present)
    free(e.gathering.present)
    e.ready.items = e.gathering.items = NULL
    e.ready.present = e.gathering.present = NULL


cdef inline bint candidate_of(kv_view *view, uint32_t block, Candidate *c) noexcept nogil:
    """Describe a block that can be evicted now; False if it cannot."""
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t word = kv_u64_load_acquire(&b.word)
    c.recency = kv_u64_load_relaxed(&b.recency)
    c.block = block
    c.generation = kv_word_generation(word)
    return evictable(word)


cdef void start_sweep(kv_view *view, Evictor *e) noexcept nogil:
    e.gathering.recency_max = 0  # empty: it was `ready` until it was used up
    e.sweep_seen = 0
    e.cursor = 0
    e.sweep_start_tick = kv_u64_load_relaxed(&view.header.tick)


cdef void evictor_advance(kv_view *view, Evictor *e, uint32_t step) noexcept nogil:
    """Let the sweep go on for `step` blocks.

    When it is done and `ready` is used up, it becomes `ready`.
    """
    cdef uint32_t i, stop, lasted
    cdef uint64_t word
    cdef Candidate c
    cdef CandidateHeap used
    if e.ranks != NULL:
        ranked_advance(view, e, step)
        return
    if e.cursor == 0:
        start_sweep(view, e)
    stop = e.cursor + step
    if stop > view.shape.block_capacity or stop < e.cursor:
        stop = view.shape.block_capacity
    for i in range(e.cursor, stop):
        word = kv_u64_load_acquire(&view.blocks[i].word)
        if not unheld(word):
            continue
        e.sweep_seen += 1
        if (kv_word_children(word) == 0 and candidate_of(view, i, &c)
                and kv_recency_tick(c.recency) <= e.sweep_start_tick):
            heap_push(&e.gathering, c)
    e.cursor = stop
    if stop == view.shape.block_capacity and e.ready.count == 0:
        used = e.ready
        e.ready = e.gathering
        e.gathering = used
        e.ready_start_tick = e.sweep_start_tick
        e.cursor = 0
        # The next sweep ends shortly before `ready` is used up, if that lasts as long as the last
        # one: a leaf is followed by its ancestors, and other leaders evict them as well. The first
        # is taken to last for a quarter of what was seen.
        lasted = e.taken if e.taken != 0 else e.sweep_seen // 4
        e.sweep_step = (view.shape.block_capacity // 4 * 5) // (lasted + 1) + e.sweep_least
        e.taken = 0
        if e.sweep_step > SWEEP_STEP_MAX:
            e.sweep_step = SWEEP_STEP_MAX
        if e.ready.count != 0:
            e.found_nothing_ns = 0


cdef void evictor_offer(kv_view *view, Evictor *e, uint32_t block) noexcept nogil:
    """A block may have become evictable now: its last child left, or it was returned."""
    cdef Candidate c
    if e.ranks != NULL:
        ranked_offer(view, e, block)
        return
    if not candidate_of(view, block, &c):
        return
    if (e.found_nothing_ns != 0 or kv_recency_tick(c.recency) <= e.ready_start_tick
            or (e.ready.count != 0 and c.recency <= e.ready.recency_max)):
        heap_push(&e.ready, c)
    elif block < e.cursor and (kv_recency_tick(c.recency) <= e.sweep_start_tick
                               or c.recency <= e.gathering.recency_max):
        heap_push(&e.gathering, c)


cdef bint next_ready(kv_view *view, Evictor *e) noexcept nogil:
    """Make `ready` non-empty if anything is evictable.

    Ends the sweep in progress, then sweeps everything once.
    """
    cdef int _sweep
    if e.ready.count != 0:
        return True
    if e.found_nothing_ns != 0 and monotonic_ns() - e.found_nothing_ns < RETRY_EMPTY_NS:
        return False
    for _sweep in range(2):
        evictor_advance(view, e, view.shape.block_capacity)
        if e.ready.count != 0:
            return True
    e.found_nothing_ns = monotonic_ns()
    return False


cdef inline void foresee(kv_view *view, uint32_t block) noexcept nogil:
    """Fetch what the eviction of this block's parent will touch.

    The parent inherits the block's recency, so it is the next victim as a rule, and its own line is
    needed now in any case.
    """
    cdef uint32_t parent = kv_u32_load_relaxed(&view.blocks[block].parent)
    cdef uint32_t grandparent
    cdef kv_block *p
    if parent == 0 or parent > view.shape.block_capacity:
        return
    p = &view.blocks[parent - 1]
    index_prefetch(view, kv_u64_load_relaxed(&p.digest_lo), kv_u64_load_relaxed(&p.digest_hi))
    grandparent = kv_u32_load_relaxed(&p.parent)
    if grandparent != 0 and grandparent <= view.shape.block_capacity:
        block_prefetch(view, grandparent - 1)


cdef bint evictor_take(kv_view *view, Evictor *e, kv_counter reason, uint32_t *block,
                       uint32_t *host_slot) noexcept nogil:
    """Evict the next victim, and count it under its reason too.

    Its record and host slot now belong to the caller. False: nothing is evictable.
    """
    cdef Candidate c, now
    cdef uint64_t word
    cdef uint32_t parent = KV_NONE
    if e.ranks != NULL:
        return ranked_take(view, e, reason, block, host_slot)
    evictor_advance(view, e, e.sweep_step)
    while next_ready(view, e):  # each turn uses up an entry, or ends
        c = heap_pop(&e.ready)
        word = kv_u64_load_acquire(&view.blocks[c.block].word)
        if not candidate_of(view, c.block, &now):
            continue
        # The word that block_evict compares with was evictable itself, not only what it was later.
        if (not evictable(word) or kv_word_generation(word) != c.generation
                or now.generation != c.generation or now.recency != c.recency):
            evictor_offer(view, e, c.block)
            continue
        foresee(view, c.block)
        if block_evict(view, c.block, word, host_slot, &parent):
            kv_count(view, KV_C_EVICTED, 1)
            kv_count(view, reason, 1)
            e.taken += 1
            if parent != KV_NONE:
                evictor_offer(view, e, parent)
            block[0] = c.block
            return True
    return False
