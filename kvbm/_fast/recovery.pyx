# SPDX-License-Identifier: Apache-2.0
"""Return what dead participants held.

One process recovers at a time: the holder of the recovery lock, which the kernel drops if it dies
in turn. Every step may run again, from the start, at any time:

1. find dead lines: marked as used, and their lock can be taken; it is kept until the end; a leader
   is finished with only when none of its workers lives, because a live worker may still be writing
   into slots that the leader reserved;
2. operations of dead leaders are cancelled; ranks that a dead worker was running count as failed;
3. blocks: holder bits of dead leaders are cleared; what they were filling or evicting goes back to
   RESET;
4. if no live participant is inside the structure (layout.h, [S0] to [S3]): children are recounted,
   pools are rebuilt from what no block names, stale index entries are deleted. Otherwise counts
   stay too high and lost slots stay lost until the next recovery; nothing is ever counted too low
   or handed out twice;
5. dead lines are marked as unused.

Steps 1 to 3 and 5 touch only what belongs to the dead, one compare-and-swap a word.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvbm._fast.atomics cimport (
    kv_cpu_pause,
    kv_u32_load_acquire,
    kv_u32_load_relaxed,
    kv_u32_load_seq_cst,
    kv_u32_once,
    kv_u32_store_release,
    kv_u32_store_seq_cst,
    kv_u64_cas_acq_rel,
    kv_u64_load_acquire,
)
from kvbm._fast.blocks cimport block_leave
from kvbm._fast.index cimport index_purge
from kvbm._fast.layout cimport (
    KV_C_RECOVERED,
    KV_C_RECOVERIES,
    KV_CHILDREN_MAX,
    KV_EMPTY,
    KV_EVICTING,
    KV_LEADERS,
    KV_OP_COMPLETE,
    KV_OP_FAILED,
    KV_OP_FINISHING,
    KV_OP_FREE,
    KV_OPERATIONS_PER_LEADER,
    KV_PARTIAL,
    KV_PARTICIPANTS,
    KV_POOL_BLOCKS,
    KV_POOL_DISK,
    KV_POOL_HOST,
    KV_RANK_DONE,
    KV_REGISTERED,
    KV_RESET,
    KV_ROLE_NONE,
    KV_TIER_DISK,
    KV_TIER_HOST,
    kv_block,
    kv_count,
    kv_op_finisher,
    kv_op_generation,
    kv_op_rank,
    kv_op_rows,
    kv_op_state,
    kv_operation,
    kv_operation_at,
    kv_placement_slot,
    kv_placement_state_of,
    kv_view,
    kv_word_children,
    kv_word_generation,
    kv_word_holders,
    kv_word_make,
    kv_word_state,
    kv_worker_line,
)
from kvbm._fast.locks cimport lock_drop, lock_take
from kvbm._fast.operations cimport (
    operation_cancel,
    operation_end,
    operation_finished,
    operation_recycle,
)
from kvbm._fast.pool cimport pool_set_word
from kvbm._fast.segment cimport Segment, line_lock, recovery_lock

cdef enum:
    INSIDE_SPINS = 20000     # how long recovery waits for a participant outside: about 1 ms


cdef struct Recovery:
    uint8_t dead[272]        # by line: marked as used, and its lock is held by this recovery
    uint8_t locked[272]      # by line: locked by this recovery, so that nobody claims it meanwhile
    uint32_t dead_leaders    # bits
    uint32_t busy_leaders    # dead, but a worker of theirs is alive
    uint32_t *protected_     # by block: generation + 1 that a live worker of a dead leader fills
    uint32_t *children       # by block: recounted
    uint64_t *named          # bitmap of one pool


cdef bint take_line_lock(kv_view *view, int fd, Recovery *r, uint32_t line) noexcept nogil:
    """Lock a line whose process is dead, so that it cannot come to life under the recovery."""
    if line == view.self:
        return False
    if not r.locked[line]:
        r.locked[line] = lock_take(fd, line_lock(line), True) == 1
    return r.locked[line]


cdef void find_dead(kv_view *view, int fd, Recovery *r) noexcept nogil:
    """Step 1. The lines of the dead, and all worker lines of dead leaders, are locked."""
    cdef uint32_t line, leader, rank
    for line in range(KV_PARTICIPANTS):
        if kv_u32_load_acquire(&view.participants[line].role) != KV_ROLE_NONE:
            # The role once more: its owner may have left in good order before the lock was taken.
            r.dead[line] = (take_line_lock(view, fd, r, line) and kv_u32_load_acquire(
                &view.participants[line].role) != KV_ROLE_NONE)
    for leader in range(KV_LEADERS):
        if not r.dead[leader]:
            continue
        r.dead_leaders |= <uint32_t>1 << leader
        for rank in range(view.shape.ranks):
            if not take_line_lock(view, fd, r, kv_worker_line(leader, rank)):
                r.busy_leaders |= <uint32_t>1 << leader


cdef void drop_line_locks(int fd, Recovery *r) noexcept nogil:
    cdef uint32_t line
    for line in range(KV_PARTICIPANTS):
        if r.locked[line]:
            lock_drop(fd, line_lock(line))


cdef void recover_operations(kv_view *view, Recovery *r) noexcept nogil:
    """Step 2. Blocks of operations that a live worker still runs are protected."""
    cdef uint32_t leader, index, rank, i, block
    cdef kv_operation *op
    cdef uint64_t word
    for leader in range(KV_LEADERS):
        for index in range(KV_OPERATIONS_PER_LEADER):
            op = kv_operation_at(view, leader, index)
            word = kv_u64_load_acquire(&op.word)
            if kv_op_state(word) == KV_OP_FREE:
                continue
            if (r.dead_leaders >> leader) & 1:
                operation_cancel(view, op, kv_op_generation(word))
            for rank in range(view.shape.ranks):
                if r.dead[kv_worker_line(leader, rank)] and kv_op_rank(word, rank) < KV_RANK_DONE:
                    # A rank that never began fails with the cancel, one that was running here.
                    operation_cancel(view, op, kv_op_generation(word))
                    operation_end(view, op, rank, False)
            word = kv_u64_load_acquire(&op.word)
            if (kv_op_state(word) == KV_OP_FINISHING
                    and r.dead[kv_worker_line(leader, kv_op_finisher(word))]):
                operation_finished(view, op)  # its leader publishes what the dead rank did not
            if not (r.dead_leaders >> leader) & 1:
                continue
            word = kv_u64_load_acquire(&op.word)
            if kv_op_state(word) == KV_OP_COMPLETE or kv_op_state(word) == KV_OP_FAILED:
                operation_recycle(view, op)
            elif (r.busy_leaders >> leader) & 1:
                for i in range(kv_op_rows(op)):
                    block = kv_u32_once(&op.rows[i].block)
                    if block < view.shape.block_capacity:
                        r.protected_[block] = kv_u32_once(&op.rows[i].generation) + 1
            else:  # nobody runs it: FINISHING when its last worker died
                operation_recycle(view, op)


cdef void recover_block(kv_view *view, Recovery *r, uint32_t block) noexcept nogil:
    """Step 3 for one block: no dead holder is left, unless a live worker still fills it."""
    cdef kv_block *b = &view.blocks[block]
    cdef uint64_t word = kv_u64_load_acquire(&b.word)
    cdef uint32_t holders, ignored = 0
    while True:
        holders = kv_word_holders(word)
        if (holders & r.dead_leaders == 0
                or r.protected_[block] == kv_word_generation(word) + 1):
            return
        if kv_word_state(word) == KV_REGISTERED:
            if kv_u64_cas_acq_rel(&b.word, &word, kv_word_make(
                    KV_REGISTERED, holders & ~r.dead_leaders, kv_word_children(word),
                    kv_word_generation(word))):
                return
        elif kv_word_state(word) == KV_PARTIAL:
            if kv_u64_cas_acq_rel(&b.word, &word, kv_word_make(
                    KV_EVICTING, holders, 0, kv_word_generation(word) + 1)):
                block_leave(view, block, False, &ignored)
                kv_count(view, KV_C_RECOVERED, 1)
                return
        elif kv_word_state(word) == KV_EVICTING:
            # Whether the parent was uncounted is unknown: it is recounted.
            block_leave(view, block, False, &ignored)
            kv_count(view, KV_C_RECOVERED, 1)
            return
        else:
            return


cdef bint nobody_inside(kv_view *view, int fd, Recovery *r) noexcept nogil:
    """[S3] True once every live participant has been seen outside, within a bounded time.

    A line that says `inside` and whose lock can be taken is nobody's: somebody scribbled on it.
    """
    cdef uint32_t line
    cdef int _spin
    for line in range(KV_PARTICIPANTS):
        if line == view.self or r.dead[line]:
            continue
        for _spin in range(INSIDE_SPINS):
            if kv_u32_load_seq_cst(&view.participants[line].inside) == 0:
                break
            kv_cpu_pause()
        else:
            if not take_line_lock(view, fd, r, line):
                return False
            kv_u32_store_release(&view.participants[line].inside, 0)
    return True


cdef void recount(kv_view *view, Recovery *r) noexcept nogil:
    cdef uint32_t block, parent
    cdef uint64_t word
    for block in range(view.shape.block_capacity):
        word = kv_u64_load_acquire(&view.blocks[block].word)
        parent = kv_u32_load_relaxed(&view.blocks[block].parent)
        if (kv_word_state(word) == KV_REGISTERED and parent != 0
                and parent <= view.shape.block_capacity):
            r.children[parent - 1] += 1
    for block in range(view.shape.block_capacity):
        word = kv_u64_load_acquire(&view.blocks[block].word)
        while (kv_word_state(word) == KV_REGISTERED and kv_word_children(word) != r.children[block]
               and r.children[block] <= KV_CHILDREN_MAX):
            if kv_u64_cas_acq_rel(&view.blocks[block].word, &word, kv_word_make(
                    KV_REGISTERED, kv_word_holders(word), r.children[block],
                    kv_word_generation(word))):
                break


cdef void rebuild_pool(kv_view *view, Recovery *r, int pool, int tier) noexcept nogil:
    """Free is what no block names; `tier` < 0: the pool of block records."""
    cdef uint32_t block, index, i, capacity = view.pool[pool].capacity
    cdef uint64_t placement, bits
    for i in range(view.pool[pool].word_count):
        r.named[i] = 0
    for block in range(view.shape.block_capacity):
        if kv_word_state(kv_u64_load_acquire(&view.blocks[block].word)) == KV_RESET:
            continue
        index = block
        if tier >= 0:
            placement = kv_u64_load_acquire(&view.blocks[block].placement[tier])
            if kv_placement_state_of(placement) == KV_EMPTY:
                continue
            index = kv_placement_slot(placement)
        if index < capacity:
            r.named[index // 64] |= (<uint64_t>1) << (index % 64)
    for i in range(view.pool[pool].word_count):
        bits = ~r.named[i]
        if capacity - i * 64 < 64:
            bits &= ((<uint64_t>1) << (capacity - i * 64)) - 1
        pool_set_word(view, pool, i, bits)


cdef bint rebuild(kv_view *view, int fd, Recovery *r) noexcept nogil:
    """Step 4. True if it could be done."""
    cdef bint alone
    kv_u32_store_seq_cst(&view.header.recovering, 1)  # [S2]
    alone = nobody_inside(view, fd, r)
    if alone:
        recount(view, r)
        rebuild_pool(view, r, KV_POOL_BLOCKS, -1)
        rebuild_pool(view, r, KV_POOL_HOST, KV_TIER_HOST)
        rebuild_pool(view, r, KV_POOL_DISK, KV_TIER_DISK)
        index_purge(view)
    kv_u32_store_seq_cst(&view.header.recovering, 0)
    return alone


cdef int release_dead_lines(kv_view *view, Recovery *r) noexcept nogil:
    """Step 5. The line of a leader with live workers stays: recovery comes back for its blocks."""
    cdef uint32_t line
    cdef int released = 0
    for line in range(KV_PARTICIPANTS):
        if not r.dead[line] or (line < KV_LEADERS and (r.busy_leaders >> line) & 1):
            continue
        kv_u32_store_release(&view.participants[line].inside, 0)
        kv_u32_store_release(&view.participants[line].role, KV_ROLE_NONE)
        released += 1
    return released


cdef int recover_locked(kv_view *view, int fd, bint always_rebuild, Recovery *r) noexcept nogil:
    cdef uint32_t block, line, dead = 0
    find_dead(view, fd, r)
    for line in range(KV_PARTICIPANTS):
        dead += r.dead[line]
    if dead == 0 and not always_rebuild:
        if kv_u32_load_acquire(&view.header.recovering) != 0:  # left by a recoverer that died
            kv_u32_store_seq_cst(&view.header.recovering, 0)
        return 0
    recover_operations(view, r)
    for block in range(view.shape.block_capacity):
        recover_block(view, r, block)
    if not rebuild(view, fd, r):
        return 0  # the dead lines stay marked, so the next recovery finds them and tries again
    kv_count(view, KV_C_RECOVERIES, 1)
    return release_dead_lines(view, r)


cdef bint recovery_init(kv_view *view, Recovery *r) noexcept nogil:
    """Empty private tables; False: out of memory."""
    cdef uint32_t capacity = view.shape.block_capacity, most = capacity
    if view.shape.host_slots > most:
        most = view.shape.host_slots
    if view.shape.disk_slots > most:
        most = view.shape.disk_slots
    memset(r, 0, sizeof(Recovery))
    r.protected_ = <uint32_t *>calloc(capacity, sizeof(uint32_t))
    r.children = <uint32_t *>calloc(capacity, sizeof(uint32_t))
    r.named = <uint64_t *>calloc((most + 63) // 64, sizeof(uint64_t))
    return r.protected_ != NULL and r.children != NULL and r.named != NULL


cdef int recover_view(kv_view *view, int fd, bint always_rebuild) noexcept nogil:
    """`recover` without Python: lines that were cleaned up, -1 if there is no memory for it."""
    cdef Recovery r
    cdef int released = -1
    if lock_take(fd, recovery_lock(), True) != 1:
        return 0
    if recovery_init(view, &r):
        released = recover_locked(view, fd, always_rebuild, &r)
    drop_line_locks(fd, &r)
    free(r.protected_)
    free(r.children)
    free(r.named)
    lock_drop(fd, recovery_lock())
    return released


def recover(Segment segment not None, rebuild: bool = False) -> int:
    """Return what dead participants held; nothing happens when another process is recovering.

    Parameters
    ----------
    segment : Segment
        Attached and writable.
    rebuild : bool
        Recount and rebuild the pools even if nobody is dead (a segment that was left by all of its
        users).

    Returns
    -------
    int
        Lines of dead participants that were cleaned up.

    Raises
    ------
    MemoryError
        There is no memory for its private tables; nothing has been changed.
    """
    cdef int released
    cdef bint always_rebuild = rebuild
    segment.check_open()
    with nogil:
        released = recover_view(&segment.view, segment.fd, always_rebuild)
    if released < 0:
        raise MemoryError("no memory for a recovery's private tables")
    return released
