# SPDX-License-Identifier: Apache-2.0
"""Two tables: what moves between the host tier and the disk tier, and what makes it unreachable."""

from __future__ import annotations

from collections.abc import Iterable

from tests.model import actors, disk
from tests.model.cells import Seed, Sizes
from tests.model.setting import Part, Scenario, part, recoverer, survivor

A, AB, ABC, X = ("A",), ("A", "B"), ("A", "B", "C"), ("X",)
SEED_A, SEED_B = Seed("A"), Seed("B", 0)
DAMAGED_A = Seed("A", damaged=True)


def sizes(leaders: int, blocks: int = 1, on_disk: bool = False) -> Sizes:
    """As many slots and entries as blocks; operations are in the host tier's segment alone."""
    operations = 0 if on_disk else 1
    return Sizes(blocks, blocks, leaders, 1, operations, 1, blocks, disk=on_disk)


def worker(leader: int) -> Part:
    """The worker of a leader, which runs one operation."""
    return part("worker", actors.worker, 1, leader=leader, rank=0, idles=True)


def transfer_scenarios() -> Iterable[Scenario]:
    """Spills and fetches beside others that need the slots, in either table."""
    yield Scenario(
        "spill",
        "a spill, while another leader evicts what it reads and stores another block there",
        sizes(3),
        (SEED_A,),
        (
            part("leader", disk.spiller, A, leader=0),
            worker(0),
            part("recycler", actors.recycler, (0,), "X", leader=1),
            survivor(2),
        ),
        2,
        sizes(3, on_disk=True),
    )
    yield Scenario(
        "fetch",
        "a fetch, while another leader evicts what it reads and writes another block there",
        sizes(4),
        (),
        (
            part("leader", disk.fetcher, A, leader=0),
            worker(0),
            part("recycler", disk.on_disk, actors.recycler, (0,), "X", leader=1),
            recoverer(2),
            survivor(3),
        ),
        1,
        sizes(4, on_disk=True),
        (SEED_A,),
    )
    yield Scenario(
        "two spills",
        "two engines write one block at once",
        sizes(3),
        (SEED_A,),
        (
            part("first", disk.spiller, A, leader=0),
            worker(0),
            part("second", disk.spiller, A, leader=1),
            worker(1),
            survivor(2),
        ),
        1,
        sizes(3, 2, on_disk=True),
    )
    yield Scenario(
        "damaged block",
        "a block that cannot be read leaves with what follows it, while its chain is continued",
        sizes(3, 2),
        (),
        (
            part("leader", disk.fetcher, AB, leader=0),
            worker(0),
            part("storer", disk.on_disk, actors.storer, ABC, leader=1),
            survivor(2),
        ),
        1,
        sizes(3, 3, on_disk=True),
        (DAMAGED_A, SEED_B),
    )


def death_scenarios() -> Iterable[Scenario]:
    """Workers that outlive their leader at the disk."""
    yield Scenario(
        "spill outlives its leader",
        "a leader dies while its worker writes; another one writes and reads in the same disk slot",
        sizes(4),
        (SEED_A,),
        (
            part("leader", disk.spiller, A, leader=0),
            worker(0),
            recoverer(1),
            Part("storer", lambda p: disk.storer_and_reader(p, X), 2, idles=True),
            survivor(3),
        ),
        1,
        sizes(4, on_disk=True),
    )
    yield Scenario(
        "restore",
        "as above, for a part of what was held; the source is used again, the slab is searched",
        sizes(4, 2),
        (SEED_A, SEED_B),
        (
            part("leader", disk.spiller, AB, leader=0),
            worker(0),
            part("recycler", disk.recycler_after_recovery, (1, 0), "X", leader=1, idles=True),
            Part("restorer", lambda p: disk.restorer_and_reader(p, A), 2, idles=True),
            survivor(3),
        ),
        1,
        sizes(4, on_disk=True),
    )


def reset_scenarios() -> Iterable[Scenario]:
    """Both tables are made unreachable while something moves between them."""
    for name, about, mover, seeds, on_disk in (
        ("reset beside a spill", "both tables are reset during a spill", disk.spiller, True, False),
        ("reset beside a fetch", "both tables are reset during a fetch", disk.fetcher, False, True),
    ):
        yield Scenario(
            name,
            about,
            sizes(4),
            (SEED_A,) if seeds else (),
            (
                part("leader", mover, A, leader=0),
                worker(0),
                part("resetter", disk.resetter, (0,), leader=1),
                Part("reader", lambda p: disk.late_reader(p, A), 2, idles=True),
                survivor(3),
            ),
            1,
            sizes(4, on_disk=True),
            (SEED_A,) if on_disk else (),
        )


def disk_scenarios() -> list[Scenario]:
    """All of them."""
    return [*transfer_scenarios(), *death_scenarios(), *reset_scenarios()]
