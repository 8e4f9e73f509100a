# SPDX-License-Identifier: Apache-2.0
"""How a policy ranks blocks in the order of eviction: by their last use's class, and their age.

The core knows two things and nothing of what they mean: each block's last use by this leader (a
number that a request gets when it is matched for the first time), and of each use a class, which
the policy may change later. A table says for a class and an age how high a block ranks; the age is
counted in ticks since its last return. The order becomes (priority, rank, tick), smallest first,
still leaves first; kvbm/_fast/ranked.pyx says when ranks are looked up.

All of it is private to one leader and no part of the segment. So leaders with different policies,
or other programs, share a table as before: whatever is evicted, it was evictable, and that is
decided by the block's word alone. What they disagree about is only which block goes first. A block
that somebody else has returned since carries another tick than its stamp; then its class is not
known (row 0 of the table), as for blocks that were there before this leader came.

A policy is an object with one method, `arrive(use, keys, stop, hits)`, called at the first match of
a sequence; what it returns is the class. If it raises, it is not asked again, and the order is
upstream's from then on.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvbm._fast.atomics cimport kv_u64_load_relaxed
from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport KV_NONE, kv_recency_priority, kv_recency_tick, kv_view
from kvbm._fast.segment cimport Segment

import logging

AGES = RANK_AGES
CLASSES = RANK_CLASSES
USES_KNOWN = USES
AGE_STARTS = [0, 1, *((1 << c // 2) + c % 2 * (1 << c // 2 >> 1) for c in range(2, AGES))]
"""First age of each column of a table of ranks, in ticks."""

logger = logging.getLogger(__name__)


cdef void ranks_stamp(kv_view *view, Ranks *r, uint32_t block, uint32_t use) noexcept nogil:
    """This leader holds the block for this use."""
    r.stamps[block].use = use
    r.stamps[block].tick = <uint32_t>kv_recency_tick(
        kv_u64_load_relaxed(&view.blocks[block].recency))


cdef void ranks_check(kv_view *view, Ranks *r, uint32_t block) noexcept nogil:
    """Forget a stamp that is not that of the block's last return."""
    if r.stamps[block].tick != <uint32_t>kv_recency_tick(
            kv_u64_load_relaxed(&view.blocks[block].recency)):
        r.stamps[block].use = 0


cdef void ranks_returned(kv_view *view, Ranks *r, uint32_t block, uint64_t tick) noexcept nogil:
    """This leader is about to return the block with this tick."""
    cdef Use *use
    ranks_check(view, r, block)
    r.stamps[block].tick = <uint32_t>tick
    use = use_of(r, r.stamps[block].use)
    if use != NULL and use.returned < tick:
        use.returned = tick


cdef void ranks_inherit(kv_view *view, Ranks *r, uint32_t child, uint32_t parent) noexcept nogil:
    """A child was evicted, whose stamp and parent's stamp had been checked before.

    As the parent has the later of both ticks, it has the later use.
    """
    if r.stamps[parent].use < r.stamps[child].use:
        r.stamps[parent].use = r.stamps[child].use
    r.stamps[parent].tick = <uint32_t>kv_recency_tick(
        kv_u64_load_relaxed(&view.blocks[parent].recency))


cdef uint64_t ranks_order(const Ranks *r, uint32_t block, uint64_t recency,
                          uint64_t now) noexcept nogil:
    """Order of a block at tick `now`: priority, rank, tick.

    Of the tick there are 40 bits: after so many returns old blocks of the same rank may be taken
    for new ones, once.
    """
    cdef uint64_t tick = kv_recency_tick(recency)
    cdef uint64_t age = now - tick if now > tick else 0
    cdef uint32_t row = 0
    cdef Use *use
    if r.stamps[block].tick == <uint32_t>tick:
        use = use_of(r, r.stamps[block].use)
        if use != NULL:
            row = use.rank_class
    return ((<uint64_t>kv_recency_priority(recency) << 48)
            | (<uint64_t>r.table[row * RANK_AGES + age_column(age)] << ORDER_TICK_BITS)
            | (tick & (((<uint64_t>1) << ORDER_TICK_BITS) - 1)))


cdef class Uses:
    """The uses of one leader's blocks, with their classes, and the ranks of these.

    Parameters
    ----------
    segment : Segment
        Attached; what the leader's table is made of.
    """

    def __cinit__(self, Segment segment not None):
        segment.check_open()
        self.segment = segment
        self.view = &segment.view
        self.ranks.blocks = segment.view.shape.block_capacity
        self.ranks.stamps = <Stamp *>calloc(self.ranks.blocks, sizeof(Stamp))
        self.ranks.uses = <Use *>calloc(USES, sizeof(Use))
        self.ranks.ready.items = <Ranked *>calloc(self.ranks.blocks, sizeof(Ranked))
        self.ranks.gathering.items = <Ranked *>calloc(self.ranks.blocks, sizeof(Ranked))
        self.ranks.ready.place = <uint32_t *>calloc(self.ranks.blocks, sizeof(uint32_t))
        self.ranks.gathering.place = <uint32_t *>calloc(self.ranks.blocks, sizeof(uint32_t))
        self.ranks.returned = KV_NONE
        if (self.ranks.stamps == NULL or self.ranks.uses == NULL
                or self.ranks.ready.items == NULL or self.ranks.gathering.items == NULL
                or self.ranks.ready.place == NULL or self.ranks.gathering.place == NULL):
            raise MemoryError("no memory for the classes of blocks")

    def __dealloc__(self):
        free(self.ranks.stamps)
        free(self.ranks.uses)
        free(self.ranks.ready.items)
        free(self.ranks.gathering.items)
        free(self.ranks.ready.place)
        free(self.ranks.gathering.place)

    @property
    def blocks(self) -> int:
        """Blocks of the table."""
        return self.ranks.blocks

    @property
    def last(self) -> int:
        """Number of the latest use; the first is 1."""
        return self.ranks.last

    def now(self) -> int:
        """Tick of the latest return, by any leader."""
        (<Segment>self.segment).check_open()
        return kv_u64_load_relaxed(&self.view.header.tick)

    cdef uint32_t begin(self) noexcept:
        """Number of a new use, of which nothing is known yet."""
        cdef Use *use
        self.ranks.last += 1
        if self.ranks.last == 0:
            self.ranks.last = 1  # 0 is none
        use = &self.ranks.uses[self.ranks.last % USES]
        use.returned = kv_u64_load_relaxed(&self.view.header.tick)
        use.rank_class = use.cohort = use.ended = 0
        return self.ranks.last

    cdef int arrived(self, Keys keys, Py_ssize_t stop, Py_ssize_t hits) except -1:
        """Ask the policy about a use."""
        if self.policy is None:
            return 0
        try:
            self.classify(keys.use, self.policy.arrive(keys.use, keys, stop, hits))
        except Exception:
            logger.exception("the eviction policy %s failed; from now on the least recently "
                             "returned block is evicted", type(self.policy).__name__)
            self.policy = None
        return 0

    def classify(self, use: int, rank_class: int) -> None:
        """Give a use a class, at its begin or later; one that is long gone is left alone."""
        if not 0 <= rank_class < RANK_CLASSES:
            raise ValueError(f"class {rank_class} is outside 0..{RANK_CLASSES - 1}")
        cdef Use *found = use_of(&self.ranks, <uint32_t>use)
        if found != NULL:
            found.rank_class = <uint8_t>rank_class

    def set_ranks(self, ranks) -> None:
        """Replace the ranks of the first classes.

        Parameters
        ----------
        ranks : numpy.ndarray
            uint8[classes, AGES]; smaller is evicted sooner. Ranks of one table and the next should
            mean the same: for a while both are in use.
        """
        cdef const uint8_t[:, ::1] rows = ranks
        if rows.shape[0] > RANK_CLASSES or rows.shape[1] != RANK_AGES:
            raise ValueError(f"ranks of shape {rows.shape[0]} x {rows.shape[1]}: at most "
                             f"{RANK_CLASSES} classes of {RANK_AGES} ages are wanted")
        if rows.shape[0] != 0:
            memcpy(self.ranks.table, &rows[0, 0], rows.shape[0] * RANK_AGES)
