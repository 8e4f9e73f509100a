# SPDX-License-Identifier: Apache-2.0
"""Transfer requests in the segment, and the rings that carry them from a leader to its workers.

The operation word, its states and who may move it are written down in layout.h. An operation
belongs to one leader, which alone allocates, submits and recycles it; each of its workers claims
and ends its own two bits. The compare-and-swap that leaves no rank pending or running decides the
fate of the whole operation, so exactly one caller publishes, whatever the order in which the ranks
end.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.atomics cimport (
    kv_au32,
    kv_u32_load_acquire,
    kv_u32_load_relaxed,
    kv_u32_store_release,
    kv_u64_cas_acq_rel,
    kv_u64_load_acquire,
    kv_u64_load_relaxed,
    kv_u64_store_relaxed,
    kv_u64_store_release,
)
from kvbm._fast.blocks cimport (
    PUBLISHED,
    block_publish,
    monotonic_ns,
    structure_enter,
    structure_exit,
)
from kvbm._fast.layout cimport (
    KV_C_BLOCKS_LOADED,
    KV_C_BLOCKS_STORED,
    KV_C_LOADS,
    KV_C_LOADS_CANCELLED,
    KV_C_LOADS_FAILED,
    KV_C_PUBLISHED,
    KV_C_STORES,
    KV_C_STORES_CANCELLED,
    KV_C_STORES_FAILED,
    KV_NONE,
    KV_OP_CANCELLED,
    KV_OP_COMPLETE,
    KV_OP_FAILED,
    KV_OP_FINISHING,
    KV_OP_FREE,
    KV_OP_SUBMITTED,
    KV_OPERATIONS_PER_LEADER,
    KV_RANK_DONE,
    KV_RANK_FAILED,
    KV_RANK_PENDING,
    KV_RANK_RUNNING,
    KV_RANKS,
    KV_STORE,
    kv_count,
    kv_entry_make,
    kv_fills_blocks,
    kv_holder_bit,
    kv_is_disk_kind,
    kv_op_finisher,
    kv_op_generation,
    kv_op_make,
    kv_op_rank,
    kv_op_rows,
    kv_op_set_rank,
    kv_op_state,
    kv_operation,
    kv_operation_at,
    kv_ring,
    kv_ring_of,
    kv_view,
)


cdef extern from "futex.h" nogil:
    void kv_doorbell_wait(kv_au32 *bell, uint32_t seen, uint64_t timeout_ns) noexcept
    void kv_doorbell_ring(kv_au32 *bell) noexcept


cdef inline bint all_ended(uint64_t word) noexcept nogil:
    return <uint32_t>word & 0xAAAAAAAAU == 0xAAAAAAAAU  # the high bit of a rank: done or failed


cdef inline bint any_failed(uint64_t word) noexcept nogil:
    return (<uint32_t>word & (<uint32_t>word >> 1) & 0x55555555U) != 0


cdef inline uint64_t with_state(uint64_t word, uint32_t state, uint32_t finisher) noexcept nogil:
    return kv_op_make(state, finisher, kv_op_generation(word), <uint32_t>word)


cdef uint32_t rings_room(kv_view *view) noexcept nogil:
    """How many operations this leader can submit before a worker's ring is full.

    An operation that was cancelled and collected still has its entry in the ring of a worker that
    has not looked since, so entries can outnumber operations.
    """
    cdef uint32_t rank, used, room = KV_OPERATIONS_PER_LEADER
    cdef kv_ring *ring
    for rank in range(view.shape.ranks):
        ring = kv_ring_of(view, view.leader, rank)
        used = kv_u32_load_relaxed(&ring.head) - kv_u32_load_acquire(&ring.tail)  # [R3]
        if used >= KV_OPERATIONS_PER_LEADER:
            return 0
        if KV_OPERATIONS_PER_LEADER - used < room:
            room = KV_OPERATIONS_PER_LEADER - used
    return room


cdef uint32_t operation_allocate(kv_view *view, uint32_t *cursor, uint32_t *looks) noexcept nogil:
    """A free operation of this leader, KV_NONE if all are in use.

    Only the leader's own thread allocates. An allocated operation stays free until it is submitted:
    `looks`, which begins as the number of operations, makes a call that allocates several of them
    look at each once.
    """
    cdef uint32_t index
    cdef kv_operation *op
    while looks[0] != 0:
        index = cursor[0] % KV_OPERATIONS_PER_LEADER
        cursor[0] = index + 1
        looks[0] -= 1
        op = kv_operation_at(view, view.leader, index)
        if kv_op_state(kv_u64_load_acquire(&op.word)) == KV_OP_FREE:
            return index
    return KV_NONE


cdef void operation_submit(kv_view *view, uint32_t index) noexcept nogil:
    """Hand a filled-in operation to all ranks.

    Ranks that the instance does not have count as done.
    """
    cdef kv_operation *op = kv_operation_at(view, view.leader, index)
    cdef uint64_t word = kv_u64_load_relaxed(&op.word)  # only this leader moves a free operation
    cdef uint32_t rank, head, ranks = 0, kind = kv_u32_load_relaxed(&op.kind)
    cdef kv_ring *ring
    for rank in range(view.shape.ranks, KV_RANKS):
        ranks |= <uint32_t>KV_RANK_DONE << (2 * rank)
    op.submitted_ns = monotonic_ns()
    op.leader = view.leader
    kv_u64_store_relaxed(&op.completed_ns, 0)
    for rank in range(view.shape.ranks):
        kv_u64_store_relaxed(&op.failed_rows[rank], 0)
    kv_u64_store_release(&op.word,  # [O0]
                         kv_op_make(KV_OP_SUBMITTED, 0, kv_op_generation(word), ranks))
    for rank in range(view.shape.ranks):
        ring = kv_ring_of(view, view.leader, rank)
        head = kv_u32_load_relaxed(&ring.head)  # only this leader writes it
        kv_u64_store_relaxed(&ring.entry[head % KV_OPERATIONS_PER_LEADER],
                             kv_entry_make(kv_op_generation(word), kind, index))
        kv_u32_store_release(&ring.head, head + 1)  # [R0]
        kv_doorbell_ring(&ring.doorbell)


cdef bint ring_pop(kv_view *view, uint32_t rank, uint64_t *entry) noexcept nogil:
    """Next operation for this worker; False when there is none. Only that worker's thread pops."""
    cdef kv_ring *ring = kv_ring_of(view, view.leader, rank)
    cdef uint32_t tail = kv_u32_load_relaxed(&ring.tail)  # only this thread writes it
    cdef uint32_t head = kv_u32_load_acquire(&ring.head)  # [R1]
    if tail == head:
        return False
    if head - tail > KV_OPERATIONS_PER_LEADER:  # only a damaged ring: nothing in it is believed
        kv_u32_store_release(&ring.tail, head)
        return False
    entry[0] = kv_u64_load_relaxed(&ring.entry[tail % KV_OPERATIONS_PER_LEADER])
    kv_u32_store_release(&ring.tail, tail + 1)  # [R2]
    return True


cdef void doorbell_ring(kv_view *view, uint32_t leader, uint32_t rank) noexcept nogil:
    kv_doorbell_ring(&kv_ring_of(view, leader, rank).doorbell)


cdef uint32_t doorbell_read(kv_view *view, uint32_t leader, uint32_t rank) noexcept nogil:
    return kv_u32_load_acquire(&kv_ring_of(view, leader, rank).doorbell)


cdef void doorbell_wait(kv_view *view, uint32_t leader, uint32_t rank, uint32_t seen,
                        uint64_t timeout_ns) noexcept nogil:
    kv_doorbell_wait(&kv_ring_of(view, leader, rank).doorbell, seen, timeout_ns)


cdef bint operation_claim(kv_view *view, kv_operation *op, uint32_t generation,
                          uint32_t rank) noexcept nogil:
    """pending -> running for one rank.

    False if the operation was cancelled or is another one by now.
    """
    cdef uint64_t word = kv_u64_load_acquire(&op.word)
    while True:
        if (kv_op_generation(word) != generation or kv_op_state(word) != KV_OP_SUBMITTED
                or kv_op_rank(word, rank) != KV_RANK_PENDING):
            return False
        if kv_u64_cas_acq_rel(&op.word, &word, kv_op_set_rank(word, rank, KV_RANK_RUNNING)):
            return True


cdef EndResult operation_end(kv_view *view, kv_operation *op, uint32_t rank,
                             bint done) noexcept nogil:
    """running -> done or failed for one rank.

    If it is the last one, the same step decides about the whole. After that step the operation is
    the leader's again, who may fill it in anew at once: what is counted is read before.
    """
    cdef uint64_t word = kv_u64_load_acquire(&op.word)
    cdef uint64_t next_word
    cdef uint32_t kind, row_count
    cdef EndResult result
    if kv_op_rank(word, rank) != KV_RANK_RUNNING:
        return ENDED  # ended by somebody who took this rank for dead
    kind = kv_u32_load_relaxed(&op.kind)
    row_count = kv_op_rows(op)
    while True:
        if kv_op_rank(word, rank) != KV_RANK_RUNNING:
            return ENDED
        next_word = kv_op_set_rank(word, rank, KV_RANK_DONE if done else KV_RANK_FAILED)
        result = STILL_RUNNING
        if all_ended(next_word):
            result = ENDED
            if any_failed(next_word):
                next_word = with_state(next_word, KV_OP_FAILED, 0)
            elif kv_fills_blocks(kind):
                next_word = with_state(next_word, KV_OP_FINISHING, rank)
                result = MUST_PUBLISH
            else:
                next_word = with_state(next_word, KV_OP_COMPLETE, 0)
            kv_u64_store_relaxed(&op.completed_ns, monotonic_ns())
        if kv_u64_cas_acq_rel(&op.word, &word, next_word):
            break
    if result == ENDED:
        count_end(view, kind, row_count, next_word, kv_op_state(word) == KV_OP_CANCELLED)
    return result


cdef void count_end(kv_view *view, uint32_t kind, uint32_t row_count, uint64_t word,
                    bint cancelled) noexcept nogil:
    """Count an operation that has ended; one that nobody wanted any more is not a failure."""
    cdef bint store = kind == KV_STORE
    if kv_is_disk_kind(kind):
        return  # counted in the disk tier's own segment, by the leader
    if kv_op_state(word) != KV_OP_FAILED:
        kv_count(view, KV_C_STORES if store else KV_C_LOADS, 1)
        kv_count(view, KV_C_BLOCKS_STORED if store else KV_C_BLOCKS_LOADED, row_count)
    elif cancelled:
        kv_count(view, KV_C_STORES_CANCELLED if store else KV_C_LOADS_CANCELLED, 1)
    else:
        kv_count(view, KV_C_STORES_FAILED if store else KV_C_LOADS_FAILED, 1)


cdef void operation_publish(kv_view *view, kv_operation *op) noexcept nogil:
    """Publish the blocks of a store or a fetch, parents first.

    Blocks that cannot be published yet are left to the leader, which tries again when it collects
    the operation, and abandons what still has no parent.
    """
    cdef uint32_t i
    cdef uint64_t now, published = 0
    if not structure_enter(view):
        return
    now = monotonic_ns()
    for i in range(kv_op_rows(op)):
        if block_publish(view, op.rows[i].block, op.rows[i].generation, now) == PUBLISHED:
            published += 1
    structure_exit(view)
    kv_count(view, KV_C_PUBLISHED, published)


cdef void operation_finished(kv_view *view, kv_operation *op) noexcept nogil:
    """FINISHING -> COMPLETE, after the blocks have been published."""
    cdef uint64_t word = kv_u64_load_acquire(&op.word)
    cdef uint32_t kind = kv_u32_load_relaxed(&op.kind), row_count
    if kv_op_state(word) != KV_OP_FINISHING:
        return
    row_count = kv_op_rows(op)
    kv_u64_store_relaxed(&op.completed_ns, monotonic_ns())
    while kv_op_state(word) == KV_OP_FINISHING:
        if kv_u64_cas_acq_rel(&op.word, &word,
                              with_state(word, KV_OP_COMPLETE, kv_op_finisher(word))):
            count_end(view, kind, row_count, word, False)
            return


cdef void operation_cancel(kv_view *view, kv_operation *op, uint32_t generation) noexcept nogil:
    """No rank that has not begun will begin.

    Ranks that copy stop at the next row and end as failed. May be called with a handle that has
    been collected: the kind that is read is this operation's if the step succeeds.
    """
    cdef uint64_t word = kv_u64_load_acquire(&op.word)
    cdef uint64_t next_word
    cdef uint32_t rank, kind
    while kv_op_generation(word) == generation and kv_op_state(word) == KV_OP_SUBMITTED:
        kind = kv_u32_load_relaxed(&op.kind)
        next_word = with_state(word, KV_OP_CANCELLED, 0)
        for rank in range(view.shape.ranks):
            if kv_op_rank(word, rank) == KV_RANK_PENDING:
                next_word = kv_op_set_rank(next_word, rank, KV_RANK_FAILED)
        if all_ended(next_word):
            if not any_failed(next_word):
                return  # everything was done already: its last rank is about to say so
            next_word = with_state(next_word, KV_OP_FAILED, 0)
        if kv_u64_cas_acq_rel(&op.word, &word, next_word):
            if kv_op_state(next_word) == KV_OP_FAILED:
                count_end(view, kind, 0, next_word, True)
            return


cdef void operation_recycle(kv_view *view, kv_operation *op) noexcept nogil:
    """COMPLETE or FAILED -> FREE with the next generation.

    Only the leader, after it has used the result.
    """
    cdef uint64_t word = kv_u64_load_acquire(&op.word)
    kv_u64_store_release(&op.word, kv_op_make(KV_OP_FREE, 0, kv_op_generation(word) + 1, 0))


cdef bint leader_holds_nothing(kv_view *view) noexcept nogil:
    """True if no block carries this leader's bit and all of its operations are free."""
    cdef uint32_t i
    cdef uint64_t word, bit = kv_holder_bit(view.leader)
    for i in range(KV_OPERATIONS_PER_LEADER):
        word = kv_u64_load_acquire(&kv_operation_at(view, view.leader, i).word)
        if kv_op_state(word) != KV_OP_FREE:
            return False
    for i in range(view.shape.block_capacity):
        if kv_u64_load_acquire(&view.blocks[i].word) & bit:
            return False
    return True
