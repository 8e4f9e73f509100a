# SPDX-License-Identifier: Apache-2.0
"""A leader's handle on the block table: match, pin, reserve, publish, abandon.

Everything here belongs to one leader and is called from one thread of it (the engine's scheduler).
What other processes may see goes through the functions of blocks, index, pool and operations;
private are the counts of how often this leader holds each block (the shared word has one bit for
the whole leader) and the order of eviction.

References. A block is named by `ref = generation << 32 | block`, an operation by `handle =
generation << 32 | index`. A reference to something that is gone by now is recognised by its
generation and ignored.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvbm._fast.atomics cimport (
    kv_u32_fetch_add_release,
    kv_u32_load_acquire,
    kv_u64_fetch_add_relaxed,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
)
from kvbm._fast.blocks cimport (
    GONE,
    NO_PARENT,
    PUBLISHED,
    Reservation,
    block_abandon,
    block_pin,
    block_publish,
    block_reserve,
    block_unpin,
    block_used,
    chain_step,
    monotonic_ns,
    structure_enter,
    structure_exit,
)
from kvbm._fast.eviction cimport (
    evictor_free,
    evictor_init,
    evictor_offer,
    evictor_order_by,
    evictor_take,
)
from kvbm._fast.index cimport index_find, index_prefetch
from kvbm._fast.keys cimport Keys
from kvbm._fast.layout cimport (
    KV_C_ABANDONED,
    KV_C_EVICTED_CLEARED,
    KV_C_LOOKUP_BLOCKS,
    KV_C_LOOKUP_PROBES,
    KV_C_LOOKUPS,
    KV_C_MATCHED_BLOCKS,
    KV_C_PUBLISHED,
    KV_C_RESERVED,
    KV_C_RESETS,
    KV_C_SKIPPED_NO_SLOT,
    KV_NONE,
    KV_PARTIAL,
    KV_REGISTERED,
    kv_block,
    kv_count,
    kv_counter,
    kv_holder_bit,
    kv_word_generation,
    kv_word_state,
)
from kvbm._fast.ranks cimport Uses, ranks_returned, ranks_stamp
from kvbm._fast.segment cimport Segment
from kvbm._fast.supply cimport supply_give_back, supply_leave, supply_take

from kvbm._fast.segment import COUNTER_NAMES

cdef uint64_t NO_REF = 0xFFFFFFFFFFFFFFFFULL


cdef class BlockTable:
    """One leader's operations on a segment in which it has claimed a leader line.

    Parameters
    ----------
    segment : Segment
        Attached, writable, with a leader line.
    """

    def __cinit__(self, Segment segment not None):
        segment.check_open()
        if segment.view.leader == KV_NONE or segment.view.self != segment.view.leader:
            raise ValueError("the segment has no leader line yet; call claim_leader first")
        self.segment = segment
        self.view = &segment.view
        self.pins = <uint32_t *>calloc(segment.view.shape.block_capacity, sizeof(uint32_t))
        if self.pins == NULL or not evictor_init(&self.evictor, segment.view.shape.block_capacity):
            raise MemoryError("no memory for a leader's private tables")

    def __dealloc__(self):
        free(self.pins)
        evictor_free(&self.evictor)

    def order_by(self, policy, Uses uses=None) -> None:
        """Evict by a policy from now on; None: in upstream's order.

        Parameters
        ----------
        policy : object or None
            See kvbm/_fast/ranks.pyx; it ranks what `uses` counts.
        uses : Uses
            Made of this table's segment.

        Raises
        ------
        ValueError
            The uses are those of another segment.
        """
        self.segment.check_open()
        if policy is not None and (uses is None or uses.segment is not self.segment):
            raise ValueError("a policy needs the uses of this table's segment")
        evictor_order_by(&self.evictor, self.view.shape.block_capacity,
                         NULL if policy is None else &uses.ranks)
        self.uses = None if policy is None else uses
        if policy is not None:
            uses.policy = policy

    # ---- match -----------------------------------------------------------------------------------
    cdef int mix(self, Keys keys) except -1:
        """Set the masks of the group and of the key epoch as it is now."""
        self.segment.check_open()
        self.use = keys.use
        keys.set_epoch(kv_u32_load_acquire(&self.view.header.key_epoch))
        return 0

    cdef uint32_t probe(self, Keys keys, Py_ssize_t i, uint64_t *word) except? 0:
        cdef uint64_t lo, hi
        keys.digest(i, &lo, &hi)
        return index_find(self.view, lo, hi, False, word)

    cdef int prefetch(self, Keys keys, Py_ssize_t i, Py_ssize_t end) except -1:
        """Ask for the index's lines of block `i`, which will be looked up soon."""
        cdef uint64_t lo, hi
        if i < end:
            keys.digest(i, &lo, &hi)
            index_prefetch(self.view, lo, hi)
        return 0

    def match(self, Keys keys not None, start: int, stop: int) -> tuple[int, int | None]:
        """Longest run of registered blocks from `start`, pinned.

        A registered block's ancestors are registered (invariant I1), so presence along the chain is
        monotone: one look at the first block (a miss ends it), one at the last (the usual complete
        hit), then bisection; 2 + log2(n) probes at most.

        Parameters
        ----------
        keys : Keys
            Digests of the sequence.
        start, stop : int
            Block range asked about; `stop` is limited to the digests that exist.

        Returns
        -------
        count : int
            Registered blocks from `start` on.
        ref : int or None
            Reference to the deepest of them, held with its ancestors until `unpin(ref)`.
        """
        return self.noted(keys, start, stop, True)

    def hold_longest(self, Keys keys not None, stop: int) -> tuple[int, int | None]:
        """`match` from block 0 on, of what is about to be copied: no look-up in what is counted."""
        return self.noted(keys, 0, stop, False)

    cdef tuple noted(self, Keys keys, Py_ssize_t start, Py_ssize_t stop, bint is_lookup):
        """`longest`, told to those who note uses."""
        if self.uses is None or keys.use != 0:
            return self.longest(keys, start, stop, is_lookup)
        self.segment.check_open()
        keys.use = self.uses.begin()
        found = self.longest(keys, start, stop, is_lookup)
        self.uses.arrived(keys, min(stop, keys.count()), start + found[0])
        if self.uses.policy is None:  # it failed
            self.order_by(None)
        return found

    cdef tuple longest(self, Keys keys, Py_ssize_t first, Py_ssize_t stop, bint is_lookup):
        cdef Py_ssize_t low, high, middle
        cdef Py_ssize_t last = min(stop, keys.count()) - 1
        cdef uint32_t block, deepest = KV_NONE
        cdef uint64_t word, lo, hi, probes = 1
        self.mix(keys)
        if first < 0:
            raise ValueError(f"start {first} is negative")
        if is_lookup:
            kv_count(self.view, KV_C_LOOKUPS, 1)
            kv_count(self.view, KV_C_LOOKUP_BLOCKS, max(last - first + 1, 0))
        if last < first:
            return 0, None
        deepest = self.probe(keys, first, &word)
        if deepest == KV_NONE:
            if is_lookup:
                kv_count(self.view, KV_C_LOOKUP_PROBES, probes)
            return 0, None
        low = first            # registered
        high = last + 1        # not registered, or the end
        middle = last          # the usual case first: all of it
        while high - low > 1:
            block = self.probe(keys, middle, &word)
            probes += 1
            if block == KV_NONE:
                high = middle
            else:
                low = middle
                deepest = block
            middle = (low + high) // 2
        if is_lookup:
            kv_count(self.view, KV_C_LOOKUP_PROBES, probes)
        while low >= first:    # evicted between probe and pin: give up one block a turn
            keys.digest(low, &lo, &hi)
            if deepest != KV_NONE and block_pin(self.view, deepest, lo, hi):
                self.pins[deepest] += 1
                if self.evictor.ranks != NULL:
                    ranks_stamp(self.view, self.evictor.ranks, deepest, self.use)
                word = kv_u64_load_acquire(&self.view.blocks[deepest].word)
                if is_lookup:
                    kv_count(self.view, KV_C_MATCHED_BLOCKS, low - first + 1)
                    block_used(self.view, deepest)
                return low - first + 1, make_ref(deepest, kv_word_generation(word))
            low -= 1
            if low >= first:
                deepest = self.probe(keys, low, &word)
        return 0, None

    cdef bint hold_parent(self, uint64_t ref) noexcept nogil:
        """Hold a block that is to be a parent: registered, or being filled by this leader."""
        cdef uint32_t block = <uint32_t>ref
        cdef uint64_t word, bit = kv_holder_bit(self.view.leader)
        cdef kv_block *b = &self.view.blocks[block]
        word = kv_u64_load_acquire(&b.word)
        if kv_word_generation(word) != <uint32_t>(ref >> 32):
            return False
        if word & bit != 0 and self.pins[block] != 0:
            if kv_word_state(word) == KV_PARTIAL or kv_word_state(word) == KV_REGISTERED:
                self.pins[block] += 1
                return True
            return False
        if kv_word_state(word) != KV_REGISTERED:
            return False
        if not block_pin(self.view, block, kv_u64_load_acquire(&b.digest_lo),
                         kv_u64_load_acquire(&b.digest_hi)):
            return False
        self.pins[block] += 1
        if kv_word_generation(kv_u64_load_acquire(&b.word)) == <uint32_t>(ref >> 32):
            return True
        self.let_go(make_ref(block, kv_word_generation(kv_u64_load_acquire(&b.word))), 0)
        return False

    cdef void let_go(self, uint64_t ref, uint64_t tick) noexcept nogil:
        """Undo one hold; at the last one the block is returned with this tick (0: takes one).

        The hold of a reservation ends when it is published or abandoned, not here.
        """
        cdef uint32_t block = <uint32_t>ref
        cdef uint64_t word
        if (ref == NO_REF or block >= self.view.shape.block_capacity  # a damaged row
                or self.pins[block] == 0):
            return
        word = kv_u64_load_acquire(&self.view.blocks[block].word)
        if kv_word_generation(word) != <uint32_t>(ref >> 32):
            return
        if self.pins[block] == 1 and kv_word_state(word) != KV_REGISTERED:
            return
        self.pins[block] -= 1
        if self.pins[block] == 0:
            if tick == 0:
                tick = kv_u64_fetch_add_relaxed(&self.view.header.tick, 1) + 1
            if self.evictor.ranks != NULL:
                ranks_returned(self.view, self.evictor.ranks, block, tick)
            block_unpin(self.view, block, tick)
            evictor_offer(self.view, &self.evictor, block)

    def unpin(self, ref: int) -> None:
        """Let go of a block held by `match`; it becomes the most recently returned one."""
        self.segment.check_open()
        self.check_ref(ref)
        self.let_go(ref, 0)

    def is_current(self, ref: int) -> bool:
        """True while the block is registered or being filled under this generation."""
        cdef uint64_t word
        self.segment.check_open()
        self.check_ref(ref)
        word = kv_u64_load_acquire(&self.view.blocks[<uint32_t>(ref & 0xFFFFFFFF)].word)
        return (kv_word_generation(word) == <uint32_t>(ref >> 32)
                and (kv_word_state(word) == KV_REGISTERED or kv_word_state(word) == KV_PARTIAL))

    def count(self, counter: str, n: int) -> None:
        """Add to one of this leader's counters (`segment.COUNTER_NAMES`)."""
        self.segment.check_open()
        kv_count(self.view, <kv_counter><int>COUNTER_NAMES.index(counter), n)

    cdef int check_ref(self, uint64_t ref) except -1:
        if <uint32_t>ref >= self.view.shape.block_capacity:
            raise IndexError(f"block {ref & 0xFFFFFFFF} is outside "
                             f"0..{self.view.shape.block_capacity - 1}")
        return 0

    cdef uint64_t parent_ref(self, object parent, Py_ssize_t start) except? 0xFFFFFFFFFFFFFFFF:
        """Check where a chain is to be continued; NO_REF at its root."""
        if start < 0:
            raise ValueError(f"start {start} is negative")
        if parent is None:
            return NO_REF
        self.check_ref(parent)
        return parent

    # ---- reserve ---------------------------------------------------------------------------------
    cdef bint reserve_block(self, const Reservation *what, uint32_t wanted, uint32_t *block,
                            uint32_t *generation, uint32_t *slot) noexcept nogil:
        if not supply_take(self.view, &self.supply, &self.evictor, wanted, block, slot):
            kv_count(self.view, KV_C_SKIPPED_NO_SLOT, 1)
            return False
        if not block_reserve(self.view, block[0], slot[0], what, generation):
            supply_give_back(self.view, &self.supply, block[0], slot[0])
            return False
        self.pins[block[0]] = 1
        if self.evictor.ranks != NULL:
            ranks_stamp(self.view, self.evictor.ranks, block[0], self.use)
        kv_count(self.view, KV_C_RESERVED, 1)
        return True

    cdef void abandon(self, uint32_t block, uint32_t generation) noexcept nogil:
        cdef uint32_t slot = KV_NONE
        if block >= self.view.shape.block_capacity or self.pins[block] == 0:
            return  # another leader's reservation, or none
        if block_abandon(self.view, block, generation, &slot):
            self.pins[block] = 0
            supply_give_back(self.view, &self.supply, block, slot)
            kv_count(self.view, KV_C_ABANDONED, 1)

    def reserve(self, Keys keys not None, start: int, stop: int, parent: int | None = None,
                priority: int = 0) -> list[tuple[int, int]]:
        """Reserve blocks `start` to `stop` of a sequence that are not in the table yet.

        Without an operation: for callers that fill the slots themselves. Stops at the first block
        that cannot be reserved. Ancestors that are in the table stay there during the call; to keep
        them until `publish`, hold them with `match`.

        Returns
        -------
        list of (ref, slot)
            Held by this leader until `publish` and `unpin`, or `abandon_reserved`.

        Raises
        ------
        ValueError, IndexError
            A block hash, the range or the parent is impossible; nothing is reserved.
        """
        cdef Reservation what
        cdef Py_ssize_t i, end = min(stop, keys.count())
        cdef uint32_t block, generation, slot
        cdef uint64_t word, ref, held = NO_REF
        cdef bint fresh = False  # `ref` is a reservation of this call: it cannot go away
        found = []
        self.mix(keys)
        ref = self.parent_ref(parent, start)
        memset(&what, 0, sizeof(what))
        what.tick = kv_u64_load_relaxed(&self.view.header.tick)
        what.priority = priority
        what.group = keys.group
        if not structure_enter(self.view):
            return found
        try:
            for i in range(start, end):
                keys.digest(i, &what.digest_lo, &what.digest_hi)
                self.prefetch(keys, i + KEYS_AHEAD, end)
                what.sequence_hash = keys.sequence_hash(i)
                what.position = <uint32_t>i
                block = index_find(self.view, what.digest_lo, what.digest_hi, True, &word)
                if block == KV_NONE:
                    if not fresh and ref != NO_REF and ref != held:
                        self.let_go(held, 0)
                        held = ref if self.hold_parent(ref) else NO_REF
                    set_parent(&what, ref)
                    if self.reserve_block(&what, <uint32_t>(end - i), &block, &generation, &slot):
                        ref = make_ref(block, generation)
                        fresh = True
                        found.append((ref, slot))
                        continue
                    # No slot; or another engine was faster, by an instant.
                    block = index_find(self.view, what.digest_lo, what.digest_hi, True, &word)
                    if block == KV_NONE:
                        break
                ref = make_ref(block, kv_word_generation(word))
                fresh = False
        except BaseException:
            for ref, _ in found:
                self.abandon(<uint32_t>ref, <uint32_t>(ref >> 32))
            raise
        finally:
            self.let_go(held, 0)
            supply_leave(self.view, &self.supply)
            structure_exit(self.view)
        return found

    def publish(self, refs: list[int]) -> int:
        """Register reserved blocks, parents first; returns how many are registered now."""
        cdef uint64_t now = monotonic_ns()
        cdef uint64_t ref
        cdef int registered = 0, result
        self.segment.check_open()
        for ref in refs:
            self.check_ref(ref)
        if not structure_enter(self.view):
            return 0
        for ref in refs:
            result = block_publish(self.view, <uint32_t>ref, <uint32_t>(ref >> 32), now)
            if result == PUBLISHED:
                kv_count(self.view, KV_C_PUBLISHED, 1)
            registered += result != GONE and result != NO_PARENT
        structure_exit(self.view)
        return registered

    def abandon_reserved(self, refs: list[int]) -> bool:
        """Give reserved blocks and their slots back; for bytes that did not arrive.

        Blocks that are registered already are left as they are. False, with nothing done, while a
        recovery is under way: call again.
        """
        cdef uint64_t ref
        self.segment.check_open()
        for ref in refs:
            self.check_ref(ref)
        if not structure_enter(self.view):
            return False
        for ref in refs:
            self.abandon(<uint32_t>ref, <uint32_t>(ref >> 32))
        structure_exit(self.view)
        return True

    def digest_of(self, ref: int) -> bytes:
        """Digest of a held block as it is stored: 16 bytes, group and key epoch mixed in."""
        cdef uint64_t pair[2]
        self.segment.check_open()
        self.check_ref(ref)
        pair[0] = kv_u64_load_acquire(&self.view.blocks[<uint32_t>(ref & 0xFFFFFFFF)].digest_lo)
        pair[1] = kv_u64_load_acquire(&self.view.blocks[<uint32_t>(ref & 0xFFFFFFFF)].digest_hi)
        return (<char *>pair)[:16]

    def slots_of(self, ref: int, count: int) -> list[int]:
        """Host slots of a held block and its ancestors, `count` in all, shallowest first.

        Raises
        ------
        LookupError
            The chain is shorter, or one of its blocks is not in the host tier.
        """
        cdef uint32_t block = <uint32_t>(ref & 0xFFFFFFFF)
        cdef uint32_t generation = <uint32_t>(ref >> 32), slot = 0
        cdef Py_ssize_t i
        self.segment.check_open()
        self.check_ref(ref)
        slots = [0] * count
        for i in range(count - 1, -1, -1):
            if not chain_step(self.view, &block, &generation, &slot):
                raise LookupError(f"block {i} of a chain of {count} is not in the host tier")
            slots[i] = slot
        return slots

    # ---- end -------------------------------------------------------------------------------------
    def reset(self) -> int:
        """Make everything that is cached now unreachable, and give back what nobody holds.

        The key epoch moves, so that blocks that are held or being filled at this moment cannot be
        matched later either. Returns the number of blocks given back.
        """
        cdef uint32_t block, slot
        cdef int count = 0
        self.segment.check_open()
        kv_u32_fetch_add_release(&self.view.header.key_epoch, 1)
        kv_count(self.view, KV_C_RESETS, 1)
        if not structure_enter(self.view):
            return 0
        self.evictor.found_nothing_ns = 0
        while evictor_take(self.view, &self.evictor, KV_C_EVICTED_CLEARED, &block, &slot):
            supply_give_back(self.view, &self.supply, block, slot)
            count += 1
        structure_exit(self.view)
        return count

    def held(self) -> dict[int, int]:
        """Blocks that this leader holds, with how often; for tests and the viewer."""
        cdef uint32_t i
        return {i: self.pins[i] for i in range(self.view.shape.block_capacity) if self.pins[i] != 0}


cdef void set_parent(Reservation *what, uint64_t ref) noexcept nogil:
    what.parent = KV_NONE if ref == NO_REF else <uint32_t>ref
    what.parent_generation = 0 if ref == NO_REF else <uint32_t>(ref >> 32)
