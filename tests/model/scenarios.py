# SPDX-License-Identifier: Apache-2.0
"""Small configurations that are explored completely; together they contain every transition."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from tests.model import actors
from tests.model.blocks import Reserved
from tests.model.cells import FIRST_ENGINE, PARTIAL, SECOND_ENGINE, Seed, Sizes
from tests.model.disk_scenarios import disk_scenarios
from tests.model.recovery import recover
from tests.model.setting import Part, Scenario, part, recoverer, survivor

A, AB, X = ("A",), ("A", "B"), ("X",)
SEED_A, SEED_B = Seed("A"), Seed("B", 0)
FILLED_B = Seed("B", 0, 1, PARTIAL, filled=True)
RESERVED_B = (Reserved(1, 0, 1, "B"),)
TWO = Sizes(blocks=2, slots=2, entries=2)


def late_worker() -> Part:
    """A process of the first engine that becomes its rank 0."""
    body = partial(actors.late_worker, operations=1, key=FIRST_ENGINE)
    return Part("late worker", body, 0, 0, idles=True, attached=False)


def late_leader() -> Part:
    """A second engine, which takes the first one's leader slot and stores X."""
    body = partial(actors.late_leader, chain=X, key=SECOND_ENGINE)
    return Part("late leader", body, 0, None, idles=True, attached=False)


def publish_scenarios() -> Iterable[Scenario]:
    """Reserve and publish against evict and abandon."""
    yield Scenario(
        "publish and evict",
        "a child is stored while another leader evicts it and its parent",
        TWO,
        (SEED_A,),
        (
            part("storer", actors.storer, AB, leader=0),
            part("evictor", actors.evictor, (1, 0), leader=1),
            survivor(2),
        ),
    )
    yield Scenario(
        "duplicate publish",
        "worker and leader publish one reservation, another leader evicts it and its parent",
        TWO,
        (SEED_A, FILLED_B),
        (
            part("worker", actors.publisher, RESERVED_B, False, leader=0, rank=0),
            part("leader", actors.publisher, RESERVED_B, True, leader=0),
            part("evictor", actors.evictor, (1, 0), leader=1),
            survivor(2),
        ),
    )
    yield Scenario(
        "publish and abandon",
        "a worker publishes what its leader gives back and another leader reserves again",
        TWO,
        (SEED_A, FILLED_B),
        (
            part("worker", actors.publisher, RESERVED_B, False, leader=0, rank=0),
            part("leader", actors.abandoner, RESERVED_B, leader=0),
            part("storer", actors.storer, X, leader=1),
            survivor(2),
        ),
    )


def duplicate_scenarios() -> Iterable[Scenario]:
    """Two leaders that store the same digest, or below the same parent."""
    yield Scenario(
        "one digest twice",
        "two leaders store the same child, a third reads it",
        Sizes(blocks=3, slots=3, leaders=4, entries=3),
        (SEED_A,),
        (
            part("first", actors.storer, AB, leader=0),
            part("second", actors.storer, AB, leader=1),
            part("reader", actors.reader, AB, leader=2),
            survivor(3),
        ),
    )
    yield Scenario(
        "two children",
        "two leaders publish children of one parent, a third evicts all three",
        Sizes(blocks=3, slots=3, leaders=4, entries=3),
        (SEED_A, FILLED_B, FILLED_B._replace(holders=2)),
        (
            part("first", actors.publisher, RESERVED_B, True, leader=0),
            part("second", actors.publisher, (Reserved(2, 0, 2, "B"),), True, leader=1),
            part("evictor", actors.evictor, (1, 2, 0), leader=2),
            survivor(3),
        ),
    )
    yield Scenario(
        "parent being filled",
        "a child is stored below a parent that another leader has reserved",
        Sizes(blocks=3, slots=3, leaders=3, entries=3),
        (),
        (
            part("parent", actors.storer, A, leader=0),
            part("child", actors.storer, AB, leader=1),
            survivor(2),
        ),
    )


def reuse_scenarios() -> Iterable[Scenario]:
    """Look-up and pin against evict and reserve."""
    yield Scenario(
        "look-up and reuse",
        "a block is read while its record and slot are evicted for another digest",
        Sizes(blocks=1, slots=1, entries=2, digest_words=2),
        (SEED_A,),
        (
            part("reader", actors.reader, A, leader=0),
            part("recycler", actors.recycler, (0,), "X", leader=1),
            survivor(2),
        ),
    )
    yield Scenario(
        "parent and reuse",
        "a child is stored while the record of its parent is reserved for another digest",
        Sizes(blocks=2, slots=2, entries=2, digest_words=2),
        (SEED_A,),
        (
            part("child", actors.storer, AB, leader=0),
            part("recycler", actors.recycler, (0,), "X", leader=1),
            survivor(2),
        ),
    )
    yield Scenario(
        "chain",
        "a chain is read while it is evicted and stored again",
        Sizes(blocks=2, slots=2, leaders=4, entries=2),
        (SEED_A, SEED_B),
        (
            part("reader", actors.reader, AB, leader=0),
            part("storer", actors.storer, X, (1, 0), leader=1),
            part("evictor", actors.evictor, (1, 0), leader=2),
            survivor(3),
        ),
    )
    yield Scenario(
        "pool",
        "one takes a slot for good, two take one and give it back",
        Sizes(blocks=2, slots=2, leaders=4, entries=2, summary=True),
        (),
        (
            part("storer", actors.storer, X, leader=0),
            part("first", actors.pool_user, 2, leader=1),
            part("second", actors.pool_user, 2, leader=2),
            survivor(3),
        ),
    )


def late_name_scenarios() -> Iterable[Scenario]:
    """Blocks that are reserved before anybody knows what will be in them."""
    yield Scenario(
        "named late",
        "a block gets its digest after its memory; others read it and store a child below it",
        Sizes(blocks=2, slots=2, leaders=4, entries=3, digest_words=2),
        (),
        (
            part("namer", actors.late_namer, ("A", "X"), leader=0),
            part("child", actors.storer, AB, leader=1),
            part("reader", actors.reader, A, leader=2),
            survivor(3),
        ),
    )


def operation_scenarios() -> Iterable[Scenario]:
    """Claim, end, cancel, collect; rings."""
    two_ranks = Sizes(blocks=1, slots=1, leaders=2, ranks=2, entries=1)
    for name, about, cancels in (
        ("store", "a store through two workers; any of the three dies", False),
        ("store, cancelled", "the same, and the leader cancels it", True),
    ):
        yield Scenario(
            name,
            about,
            two_ranks,
            (),
            (
                part("leader", actors.store_leader, A, (), cancels, leader=0),
                part("worker 0", actors.worker, 1, leader=0, rank=0, idles=True),
                part("worker 1", actors.worker, 1, leader=0, rank=1, idles=True),
                survivor(1),
            ),
            crashes=2,
        )
    yield Scenario(
        "load",
        "a load, while another leader evicts what it reads and stores another block there",
        Sizes(blocks=1, slots=1, entries=1),
        (SEED_A,),
        (
            part("leader", actors.load_leader, A, leader=0),
            part("worker", actors.worker, 1, leader=0, rank=0, idles=True),
            part("recycler", actors.recycler, (0,), "X", leader=1),
            survivor(2),
        ),
        crashes=2,
    )
    yield Scenario(
        "ring",
        "two operations, one of them cancelled and submitted again before the worker looks",
        Sizes(blocks=1, slots=1, leaders=2, operations=2, ring=2, entries=1),
        (),
        (
            part("leader", actors.ring_leader, ("s0", "s1", "c1", "s1"), leader=0),
            part("worker", actors.worker, 3, leader=0, rank=0, crashes=False, idles=True),
            survivor(1),
        ),
    )


def recovery_scenarios() -> Iterable[Scenario]:
    """A recovery while others go on, and while the recoverer dies in turn."""
    yield Scenario(
        "recovery beside a storer",
        "an evictor dies; a recovery runs while a child is stored below the parent",
        Sizes(blocks=3, slots=3, leaders=4, entries=3),
        (SEED_A, SEED_B),
        (
            part("evictor", actors.evictor, (1,), leader=0),
            part("storer", actors.storer, AB, leader=1),
            recoverer(2),
            survivor(3),
        ),
        crashes=2,
    )
    yield Scenario(
        "recovery beside a reader",
        "a storer dies; a recovery runs while the chain is pinned and evicted",
        Sizes(blocks=2, slots=2, leaders=5, entries=2),
        (SEED_A,),
        (
            part("storer", actors.storer, AB, leader=0),
            part("reader", actors.reader, AB, leader=1),
            recoverer(3),
            survivor(4),
        ),
    )
    yield Scenario(
        "recoverer dies",
        "a storer dies, then who recovers; another leader evicts and stores",
        Sizes(blocks=2, slots=2, leaders=4, entries=2),
        (SEED_A,),
        (
            part("first", actors.storer, AB, leader=0),
            part("second", actors.storer, X, (0,), leader=1),
            recoverer(2),
            survivor(3),
        ),
        crashes=2,
    )
    yield Scenario(
        "two recoverers",
        "a storer dies; two survivors recover, one of them may die as well",
        Sizes(blocks=2, slots=2, leaders=4, entries=2),
        (SEED_A,),
        (
            part("storer", actors.storer, AB, leader=0),
            recoverer(1),
            recoverer(2),
            survivor(3),
        ),
        crashes=2,
    )
    yield Scenario(
        "recovery by a guest",
        "a process without a line rebuilds and dies",
        Sizes(blocks=1, slots=1, leaders=3, entries=1),
        (SEED_A,),
        (
            part("guest", recover, True, leader=0, attached=False),
            part("storer", actors.storer, X, (0,), leader=1),
            survivor(2),
        ),
    )


def worker_scenarios() -> Iterable[Scenario]:
    """Workers that outlive their leader or are replaced, while a recovery runs."""
    one = Sizes(blocks=1, slots=1, leaders=4, entries=1)
    yield Scenario(
        "store outlives its leader",
        "a leader dies while its worker copies; a recovery runs, another leader takes free slots",
        one,
        (),
        (
            part("leader", actors.store_leader, A, leader=0),
            part("worker", actors.worker, 1, leader=0, rank=0, idles=True),
            recoverer(1),
            part("storer", actors.storer_after_crash, X, leader=2, idles=True),
            survivor(3),
        ),
        crashes=2,
    )
    yield Scenario(
        "load outlives its leader",
        "a leader dies while its worker loads a part of the match; the blocks are reused",
        Sizes(blocks=2, slots=2, leaders=4, entries=2),
        (SEED_A, SEED_B),
        (
            part("leader", actors.load_leader, AB, 1, leader=0),
            part("worker", actors.worker, 1, leader=0, rank=0, idles=True),
            recoverer(1),
            part("recycler", actors.recycler, (1, 0), "X", leader=2),
            survivor(3),
        ),
    )


def replacement_scenarios() -> Iterable[Scenario]:
    """Workers and leaders that take the place of dead ones, while a recovery runs."""
    one = Sizes(blocks=1, slots=1, leaders=4, entries=1)
    yield Scenario(
        "worker is replaced",
        "a worker dies, another becomes the same rank; a recovery runs, slots are reused",
        one,
        (),
        (
            part("leader", actors.store_leader, A, leader=0),
            part("worker", actors.worker, 1, leader=0, rank=0, idles=True),
            late_worker(),
            recoverer(1),
            part("storer", actors.storer_after_crash, X, leader=2, idles=True),
            survivor(3),
        ),
    )


def late_scenarios() -> Iterable[Scenario]:
    """Leaders and workers that claim a line while another dies."""
    yield Scenario(
        "leader is replaced",
        "a leader dies, another claims its slot and stores; a recovery runs and may die",
        Sizes(blocks=2, slots=2, leaders=3, entries=2),
        (SEED_A,),
        (
            part("leader", actors.storer, AB, leader=0),
            late_leader(),
            recoverer(1),
            survivor(2),
        ),
        crashes=2,
    )
    yield Scenario(
        "worker comes late",
        "a worker attaches while its leader dies and another engine takes the leader's slot",
        Sizes(blocks=1, slots=1, leaders=3, entries=1),
        (),
        (
            part("leader", actors.store_leader, A, leader=0),
            late_leader(),
            late_worker(),
            recoverer(1),
            survivor(2),
        ),
    )


def large_scenarios() -> Iterable[Scenario]:
    """The same with more at once."""
    yield Scenario(
        "three at once",
        "a child is stored, read and evicted with its parent; any of the three dies",
        Sizes(blocks=2, slots=2, leaders=4, entries=2),
        (SEED_A,),
        (
            part("storer", actors.storer, AB, leader=0),
            part("evictor", actors.evictor, (1, 0), leader=1),
            part("reader", actors.reader, AB, leader=2),
            survivor(3),
        ),
    )
    yield Scenario(
        "two ranks outlive their leader",
        "as above with two workers, one of which dies as well",
        Sizes(blocks=1, slots=1, leaders=4, ranks=2, entries=1),
        (),
        (
            part("leader", actors.store_leader, A, leader=0),
            part("worker 0", actors.worker, 1, leader=0, rank=0, idles=True),
            part("worker 1", actors.worker, 1, leader=0, rank=1, idles=True),
            recoverer(1),
            survivor(3),
        ),
        crashes=2,
    )
    yield Scenario(
        "two late deaths",
        "worker comes late, and any two of the five die",
        Sizes(blocks=1, slots=1, leaders=3, entries=1),
        (),
        (
            part("leader", actors.store_leader, A, leader=0),
            late_leader(),
            late_worker(),
            recoverer(1),
            survivor(2),
        ),
        crashes=2,
    )


def scenarios() -> list[Scenario]:
    """All of them."""
    return [
        *publish_scenarios(),
        *duplicate_scenarios(),
        *reuse_scenarios(),
        *late_name_scenarios(),
        *operation_scenarios(),
        *recovery_scenarios(),
        *worker_scenarios(),
        *replacement_scenarios(),
        *late_scenarios(),
        *large_scenarios(),
        *disk_scenarios(),
    ]
