# SPDX-License-Identifier: Apache-2.0
"""The contract of layout.h as data, for readers that decode the bytes of a segment themselves.

Offsets, sizes and bit positions are the compiler's: nothing is written down a second time but the
names of the fields. A reader needs no attachment, so it can look at what no process could attach to
any more: a damaged segment, a copy in a file.
"""
from typing import NamedTuple

from libc.stdint cimport uint32_t, uint64_t

from kvbm._fast.layout cimport (
    KV_BUCKET_ENTRIES,
    KV_EMPTY,
    KV_EVICTING,
    KV_FETCH,
    KV_FILLING,
    KV_FORMAT_VERSION,
    KV_HISTOGRAMS,
    KV_LATENCY_BUCKETS,
    KV_LATENCY_COPY,
    KV_LATENCY_FIRST_NS,
    KV_LATENCY_TOTAL,
    KV_LAYOUT_CHECK,
    KV_LEADERS,
    KV_LOAD,
    KV_MAGIC,
    KV_OP_CANCELLED,
    KV_OP_COMPLETE,
    KV_OP_FAILED,
    KV_OP_FINISHING,
    KV_OP_FREE,
    KV_OP_SUBMITTED,
    KV_OPERATIONS_PER_LEADER,
    KV_PAGE,
    KV_PARTIAL,
    KV_PARTICIPANTS,
    KV_POOL_BLOCKS,
    KV_POOL_DISK,
    KV_POOL_HOST,
    KV_RANK_DONE,
    KV_RANK_FAILED,
    KV_RANK_PENDING,
    KV_RANK_RUNNING,
    KV_RANKS,
    KV_READY,
    KV_REGISTERED,
    KV_RESET,
    KV_ROLE_LEADER,
    KV_ROLE_WORKER,
    KV_ROWS,
    KV_SPILL,
    KV_STORE,
    KV_TIER_DISK,
    KV_TIER_HOST,
    kv_digest_hash,
    kv_entry_make,
    kv_hash_bucket,
    kv_hash_tag,
    kv_op_make,
    kv_other_bucket,
    kv_placement_make,
    kv_recency_make,
    kv_shape,
    kv_view,
    kv_view_init,
    kv_word_make,
    kv_worker_line,
)
from kvbm._fast.segment cimport line_lock, recovery_lock, shape_to_c

from kvbm._fast.segment import Shape


cdef extern from *:
    """
    #include "layout.h"
    typedef struct { const char *record, *name; uint32_t offset, size, count; } kv_field;
    #define KV_FIELD(r, f) {#r, #f, offsetof(r, f), sizeof(((r *)0)->f), 1}
    #define KV_FIELDS(r, f) {#r, #f, offsetof(r, f), sizeof(((r *)0)->f[0]),                    \\
                             sizeof(((r *)0)->f) / sizeof(((r *)0)->f[0])}
    static const kv_field kv_field_table[] = {
        KV_FIELD(kv_header, magic), KV_FIELD(kv_header, format_version),
        KV_FIELD(kv_header, layout_check), KV_FIELD(kv_header, shape.block_capacity),
        KV_FIELD(kv_header, shape.host_slots), KV_FIELD(kv_header, shape.disk_slots),
        KV_FIELD(kv_header, shape.ranks), KV_FIELD(kv_header, shape.block_tokens),
        KV_FIELD(kv_header, shape.index_buckets), KV_FIELD(kv_header, shape.private_instance),
        KV_FIELD(kv_header, shape.check),
        KV_FIELD(kv_header, total_bytes), KV_FIELD(kv_header, nonce),
        KV_FIELD(kv_header, created_ns), KV_FIELDS(kv_header, fingerprint),
        KV_FIELD(kv_header, tick), KV_FIELD(kv_header, recovering),
        KV_FIELD(kv_header, key_epoch), KV_FIELDS(kv_header, ready_slots),
        KV_FIELDS(kv_header, description),
        KV_FIELD(kv_participant, inside), KV_FIELD(kv_participant, role),
        KV_FIELD(kv_participant, epoch), KV_FIELD(kv_participant, pid),
        KV_FIELD(kv_participant, engine_key), KV_FIELD(kv_participant, started_ns),
        KV_FIELD(kv_participant, step_bound), KV_FIELD(kv_participant, step_filled),
        KV_FIELD(kv_participant, disk_slots),
        KV_FIELD(kv_participant, attached),
        KV_FIELDS(kv_counters, value),
        KV_FIELDS(kv_histogram, bucket), KV_FIELD(kv_histogram, sum_ns),
        KV_FIELD(kv_ring, head), KV_FIELD(kv_ring, doorbell), KV_FIELD(kv_ring, tail),
        KV_FIELDS(kv_ring, entry),
        KV_FIELD(kv_operation, word), KV_FIELD(kv_operation, kind),
        KV_FIELD(kv_operation, row_count), KV_FIELD(kv_operation, step),
        KV_FIELD(kv_operation, request_key), KV_FIELD(kv_operation, submitted_ns),
        KV_FIELD(kv_operation, completed_ns), KV_FIELD(kv_operation, leader),
        KV_FIELD(kv_operation, group), KV_FIELDS(kv_operation, failed_rows),
        KV_FIELDS(kv_operation, rows),
        KV_FIELD(kv_row, device_block), KV_FIELD(kv_row, slot), KV_FIELD(kv_row, block),
        KV_FIELD(kv_row, generation),
        KV_FIELDS(kv_bucket, entry),
        KV_FIELD(kv_block, word), KV_FIELD(kv_block, digest_lo), KV_FIELD(kv_block, digest_hi),
        KV_FIELD(kv_block, recency), KV_FIELD(kv_block, parent),
        KV_FIELD(kv_block, parent_generation), KV_FIELDS(kv_block, placement),
        KV_FIELD(kv_block_cold, sequence_hash), KV_FIELD(kv_block_cold, position),
        KV_FIELD(kv_block_cold, group), KV_FIELD(kv_block_cold, registered_ns),
        KV_FIELD(kv_block_cold, uses),
    };
    enum { KV_FIELD_COUNT = sizeof(kv_field_table) / sizeof(kv_field_table[0]) };
    static const struct { const char *record; uint32_t size; } kv_size_table[] = {
        {"kv_header", sizeof(kv_header)}, {"kv_participant", sizeof(kv_participant)},
        {"kv_counters", sizeof(kv_counters)}, {"kv_histogram", sizeof(kv_histogram)},
        {"kv_ring", sizeof(kv_ring)},
        {"kv_operation", sizeof(kv_operation)}, {"kv_row", sizeof(kv_row)},
        {"kv_bucket", sizeof(kv_bucket)}, {"kv_block", sizeof(kv_block)},
        {"kv_block_cold", sizeof(kv_block_cold)},
    };
    enum { KV_SIZE_COUNT = sizeof(kv_size_table) / sizeof(kv_size_table[0]) };
    """
    ctypedef struct kv_field:
        const char *record
        const char *name
        uint32_t offset, size, count

    ctypedef struct kv_size:
        const char *record
        uint32_t size

    const kv_field kv_field_table[]
    const kv_size kv_size_table[]
    int KV_FIELD_COUNT
    int KV_SIZE_COUNT


class Field(NamedTuple):
    """A field of a record: its place, the size of one element in bytes, and how many there are."""

    name: str
    offset: int
    size: int
    length: int


class Record(NamedTuple):
    """A struct of layout.h."""

    size: int
    fields: tuple


class Section(NamedTuple):
    """A piece of the segment: where it begins, of which records, how many; "" is plain words."""

    offset: int
    length: int
    record: str


def _records() -> dict:
    cdef int i
    fields = {}
    for i in range(KV_FIELD_COUNT):
        field = Field(kv_field_table[i].name.decode(), kv_field_table[i].offset,
                      kv_field_table[i].size, kv_field_table[i].count)
        fields.setdefault(kv_field_table[i].record.decode(), []).append(field)
    return {
        kv_size_table[i].record.decode(): Record(
            kv_size_table[i].size, tuple(fields[kv_size_table[i].record.decode()]))
        for i in range(KV_SIZE_COUNT)
    }


RECORDS = _records()

# Of each word that has parts: the bits of each part.
BITS = {
    "block": {
        "state": kv_word_make(7, 0, 0, 0),
        "holders": kv_word_make(0, 0xFFFFFFFF, 0, 0),
        "children": kv_word_make(0, 0, 0xFFFFFFFF, 0),
        "generation": kv_word_make(0, 0, 0, 0xFFFFFFFF),
    },
    "placement": {
        "state": kv_placement_make(15, 0, 0),
        "generation": kv_placement_make(0, 0xFFFFFFFF, 0),
        "slot": kv_placement_make(0, 0, 0xFFFFFFFF),
    },
    "recency": {
        "priority": kv_recency_make(0xFFFF, 0),
        "tick": kv_recency_make(0, 0xFFFFFFFFFFFFFFFF),
    },
    "operation": {
        "state": kv_op_make(15, 0, 0, 0),
        "finisher": kv_op_make(0, 15, 0, 0),
        "generation": kv_op_make(0, 0, 0xFFFFFFFF, 0),
        "ranks": kv_op_make(0, 0, 0, 0xFFFFFFFF),
    },
    "ring": {
        "generation": kv_entry_make(0xFFFFFFFF, 0, 0),
        "operation": kv_entry_make(0, 0, 0xFF),
    },
}

# Names of values.
BLOCK_STATES = {KV_RESET: "reset", KV_PARTIAL: "partial", KV_REGISTERED: "registered",
                KV_EVICTING: "evicting"}
PLACEMENT_STATES = {KV_EMPTY: "empty", KV_FILLING: "filling", KV_READY: "ready"}
OPERATION_STATES = {KV_OP_FREE: "free", KV_OP_SUBMITTED: "submitted", KV_OP_CANCELLED: "cancelled",
                    KV_OP_FINISHING: "finishing", KV_OP_COMPLETE: "complete",
                    KV_OP_FAILED: "failed"}
OPERATION_KINDS = {KV_STORE: "store", KV_LOAD: "load", KV_SPILL: "spill", KV_FETCH: "fetch"}
RANK_STATES = {KV_RANK_PENDING: "pending", KV_RANK_RUNNING: "running", KV_RANK_DONE: "done",
               KV_RANK_FAILED: "failed"}
ROLES = {KV_ROLE_LEADER: "leader", KV_ROLE_WORKER: "worker"}
LATENCIES = {KV_LATENCY_TOTAL: "total", KV_LATENCY_COPY: "copy"}
TIERS = {KV_TIER_HOST: "host", KV_TIER_DISK: "disk"}
POOLS = {KV_POOL_BLOCKS: "blocks", KV_POOL_HOST: "host", KV_POOL_DISK: "disk"}

MAGIC = KV_MAGIC
FORMAT_VERSION = KV_FORMAT_VERSION
LAYOUT_CHECK = KV_LAYOUT_CHECK
PAGE_BYTES = KV_PAGE
LEADERS = KV_LEADERS
RANKS = KV_RANKS
LINES = KV_PARTICIPANTS
OPERATIONS_PER_LEADER = KV_OPERATIONS_PER_LEADER
ROWS = KV_ROWS
BUCKET_ENTRIES = KV_BUCKET_ENTRIES
# Upper bounds of the buckets of a histogram; above all of them there is one more.
LATENCY_BOUNDS_NS = tuple(KV_LATENCY_FIRST_NS << i for i in range(KV_LATENCY_BUCKETS - 1))
RECOVERY_LOCK_OFFSET = recovery_lock()


def line_lock_offset(line: int) -> int:
    """Offset of the lock that is the liveness of a participant's line."""
    return line_lock(line)


def worker_line(leader: int, rank: int) -> int:
    """Participant line of a leader's worker."""
    return kv_worker_line(leader, rank)


def fixed_sections() -> dict:
    """The sections whose place does not depend on the sizes in the header."""
    cdef kv_shape c
    shape_to_c(Shape(1, 0, 0, 1, 1, 1, False), &c)
    found = _sections(&c)
    return {name: found[name] for name in ("header", "participants", "counters")}


def sections(shape) -> dict:
    """All sections of a segment of this shape, by name; empty for a shape that is out of bounds.

    Parameters
    ----------
    shape : Shape
        Any numbers of 32 bits: a damaged header may hold them.
    """
    cdef kv_shape c
    shape_to_c(shape, &c)
    return _sections(&c)


cdef dict _sections(const kv_shape *c):
    cdef kv_view view
    cdef int pool
    cdef uint64_t total = kv_view_init(&view, NULL, c)
    if total == 0:
        return {}
    found = {
        "header": Section(0, 1, "kv_header"),
        "participants": Section(<uint64_t>view.participants, KV_PARTICIPANTS, "kv_participant"),
        "counters": Section(<uint64_t>view.counters, KV_PARTICIPANTS, "kv_counters"),
        "histograms": Section(<uint64_t>view.histograms, KV_LEADERS * c.ranks * KV_HISTOGRAMS,
                              "kv_histogram"),
        "rings": Section(<uint64_t>view.rings, KV_LEADERS * c.ranks, "kv_ring"),
        "operations": Section(<uint64_t>view.operations, KV_LEADERS * KV_OPERATIONS_PER_LEADER,
                              "kv_operation"),
    }
    for pool, name in POOLS.items():
        found[f"pool.{name}"] = Section(<uint64_t>view.pool[pool].words,
                                        view.pool[pool].word_count, "")
        found[f"summary.{name}"] = Section(<uint64_t>view.pool[pool].summary,
                                           view.pool[pool].summary_count, "")
    found["buckets"] = Section(<uint64_t>view.buckets, c.index_buckets, "kv_bucket")
    found["blocks"] = Section(<uint64_t>view.blocks, c.block_capacity, "kv_block")
    found["cold"] = Section(<uint64_t>view.cold, c.block_capacity, "kv_block_cold")
    found["end"] = Section(total, 0, "")
    return found


def index_places(const uint64_t[::1] lo, const uint64_t[::1] hi, uint32_t buckets,
                 uint32_t[::1] tag, uint32_t[::1] first, uint32_t[::1] second) -> None:
    """Where the index keeps digests: the tag of an entry, and the two buckets that it may be in.

    Parameters
    ----------
    lo, hi : array of uint64
        The halves of the digests.
    buckets : int
        Buckets of the index, a power of two.
    tag, first, second : array of uint32
        Filled in; as many as there are digests.
    """
    cdef Py_ssize_t i, count = lo.shape[0]
    cdef uint64_t h
    if not count == hi.shape[0] == tag.shape[0] == first.shape[0] == second.shape[0]:
        raise ValueError("the arrays differ in length")
    for i in range(count):
        h = kv_digest_hash(lo[i], hi[i])
        tag[i] = kv_hash_tag(h)
        first[i] = kv_hash_bucket(h, buckets - 1)
        second[i] = kv_other_bucket(first[i], tag[i], buckets - 1)


def free_count(const uint64_t[::1] words) -> int:
    """Set bits of the words of a pool."""
    cdef Py_ssize_t i
    cdef uint64_t word, count = 0
    for i in range(words.shape[0]):
        word = words[i]
        word -= (word >> 1) & 0x5555555555555555ULL
        word = (word & 0x3333333333333333ULL) + ((word >> 2) & 0x3333333333333333ULL)
        word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0FULL
        count += (word * 0x0101010101010101ULL) >> 56
    return count
