# SPDX-License-Identifier: Apache-2.0
"""Which block to evict, with a policy: (priority, rank, tick of the last return), smallest first.

As kvbm/_fast/eviction.pyx does it for upstream's order, with two private heaps and a sweep. But a
rank is not for ever: it changes with age and with what the policy learns. So here

* everything evictable is a candidate at once. What is returned, or loses its last child, comes to
  `ready`, or to another place in it;
* the sweep leaves nothing to the next one, and goes on all the time, `SWEEP_STEP` blocks an
  eviction. When it is done, what it has gathered replaces `ready`, whatever is left of that. So no
  rank is older than two sweeps: evictions of 2 / `SWEEP_STEP` of the table;
* a victim whose rank has risen meanwhile goes back with the new one, at most `RERANKED_MAX` times a
  call; then the next one goes, so that work a call stays bounded.

As there, the exception is a `ready` that runs dry, which ends the sweep in progress and begins a
whole one; and the first victim of a leader, which waits for the first sweep.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport (
    kv_u32_load_relaxed,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
)
from kvbm._fast.blocks cimport block_evict, monotonic_ns
from kvbm._fast.eviction cimport RETRY_EMPTY_NS, Evictor, evictable
from kvbm._fast.layout cimport (
    KV_C_EVICTED,
    KV_NONE,
    kv_block,
    kv_count,
    kv_counter,
    kv_view,
    kv_word_generation,
)
from kvbm._fast.ranks cimport (
    Ranked,
    RankedHeap,
    Ranks,
    ranks_check,
    ranks_inherit,
    ranks_order,
    same_use,
)

cdef enum:
    SWEEP_STEP = 8                 # blocks that the sweep looks at an eviction
    RERANKED_MAX = 8               # victims a call that go back


# ---- heap ----------------------------------------------------------------------------------------
cdef inline bint before(const Ranked *a, const Ranked *b) noexcept nogil:
    return a.order < b.order or (a.order == b.order and a.block < b.block)


cdef inline void put_at(RankedHeap *h, uint32_t i, Ranked c) noexcept nogil:
    h.items[i] = c
    h.place[c.block] = i + 1


cdef void sift(RankedHeap *h, uint32_t i, Ranked c) noexcept nogil:
    """Put an item where it belongs, from the free place `i` on."""
    cdef uint32_t other
    while i > 0:
        other = (i - 1) // 2
        if not before(&c, &h.items[other]):
            break
        put_at(h, i, h.items[other])
        i = other
    while True:
        other = 2 * i + 1
        if other >= h.count:
            break
        if other + 1 < h.count and before(&h.items[other + 1], &h.items[other]):
            other += 1
        if not before(&h.items[other], &c):
            break
        put_at(h, i, h.items[other])
        i = other
    put_at(h, i, c)


cdef void heap_put(RankedHeap *h, Ranked c) noexcept nogil:
    """Add a block, or move it to where it belongs now."""
    cdef uint32_t i = h.place[c.block]
    if i == 0:
        h.count += 1
        i = h.count
    sift(h, i - 1, c)


cdef Ranked heap_pop(RankedHeap *h) noexcept nogil:
    cdef Ranked top = h.items[0]
    h.place[top.block] = 0
    h.count -= 1
    if h.count != 0:
        sift(h, 0, h.items[h.count])
    return top


cdef void heap_clear(RankedHeap *h) noexcept nogil:
    cdef uint32_t i
    for i in range(h.count):
        h.place[h.items[i].block] = 0
    h.count = 0


# ---- order ---------------------------------------------------------------------------------------
cdef inline bint candidate_of(kv_view *view, Ranks *r, uint32_t block, Ranked *c) noexcept nogil:
    """Describe a block that can be evicted now; False if it cannot."""
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t word = kv_u64_load_acquire(&b.word)
    if not evictable(word):
        return False
    c.order = ranks_order(r, block, kv_u64_load_relaxed(&b.recency),
                          kv_u64_load_relaxed(&view.header.tick))
    c.block = block
    c.generation = kv_word_generation(word)
    return True


cdef void ranked_clear(Evictor *e) noexcept nogil:
    heap_clear(&e.ranks.ready)
    heap_clear(&e.ranks.gathering)
    e.ranks.cursor = 0
    e.ranks.returned = KV_NONE
    e.ranks.swept = False


cdef void ranked_advance(kv_view *view, Evictor *e, uint32_t step) noexcept nogil:
    """Let the sweep go on for `step` blocks."""
    cdef Ranks *r = e.ranks
    cdef uint32_t i, stop = r.cursor + step
    cdef Ranked c
    cdef RankedHeap used
    if stop > view.shape.block_capacity or stop < r.cursor:
        stop = view.shape.block_capacity
    for i in range(r.cursor, stop):
        if candidate_of(view, r, i, &c):
            heap_put(&r.gathering, c)
    r.cursor = stop
    if stop < view.shape.block_capacity:
        return
    heap_clear(&r.ready)
    used = r.ready
    r.ready = r.gathering
    r.gathering = used
    r.cursor = 0
    r.swept = True
    if r.ready.count != 0:
        e.found_nothing_ns = 0


cdef void take_in(kv_view *view, Ranks *r) noexcept nogil:
    """Give the block that was offered last its place in the order."""
    cdef uint32_t block = r.returned
    cdef Ranked c
    r.returned = KV_NONE
    if block == KV_NONE or not candidate_of(view, r, block, &c):
        return
    heap_put(&r.ready, c)
    if block < r.cursor:
        heap_put(&r.gathering, c)


cdef void ranked_offer(kv_view *view, Evictor *e, uint32_t block) noexcept nogil:
    """A block may have become evictable now.

    It is looked at when the next one comes: a chain that was stored is returned root first, and
    each block ceases to be a leaf when the next one is published.
    """
    take_in(view, e.ranks)
    e.ranks.returned = block


cdef bint next_ready(kv_view *view, Evictor *e) noexcept nogil:
    cdef int _sweep
    if e.ranks.ready.count != 0:
        return True
    if e.found_nothing_ns != 0 and monotonic_ns() - e.found_nothing_ns < RETRY_EMPTY_NS:
        return False
    for _sweep in range(2):
        ranked_advance(view, e, view.shape.block_capacity)
        if e.ranks.ready.count != 0:
            return True
    e.found_nothing_ns = monotonic_ns()
    return False


cdef bint ranked_take(kv_view *view, Evictor *e, kv_counter reason, uint32_t *block,
                      uint32_t *host_slot) noexcept nogil:
    """Evict the next victim, as `evictor_take`."""
    cdef Ranks *r = e.ranks
    cdef Ranked c, now
    cdef uint64_t word
    cdef uint32_t parent, risen = 0
    take_in(view, r)
    ranked_advance(view, e, SWEEP_STEP if r.swept else view.shape.block_capacity)
    while next_ready(view, e):  # each turn uses up an entry, corrects one, or ends
        c = heap_pop(&r.ready)
        word = kv_u64_load_acquire(&view.blocks[c.block].word)
        if not candidate_of(view, r, c.block, &now):
            continue
        # The word that block_evict compares with was evictable itself, not only what it was later.
        if (not evictable(word) or kv_word_generation(word) != c.generation
                or now.generation != c.generation or not same_use(now.order, c.order)):
            heap_put(&r.ready, now)
            continue
        if now.order > c.order and risen < RERANKED_MAX:
            risen += 1
            heap_put(&r.ready, now)
            continue
        ranks_check(view, r, c.block)
        parent = kv_u32_load_relaxed(&view.blocks[c.block].parent)
        if parent != 0 and parent <= view.shape.block_capacity:
            ranks_check(view, r, parent - 1)
        if block_evict(view, c.block, word, host_slot, &parent):
            kv_count(view, KV_C_EVICTED, 1)
            kv_count(view, reason, 1)
            if parent != KV_NONE:
                ranks_inherit(view, r, c.block, parent)
                ranked_offer(view, e, parent)
            block[0] = c.block
            return True
    return False
