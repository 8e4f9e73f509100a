# SPDX-License-Identifier: Apache-2.0
"""Longest match of a prefix of 2,000 blocks with a million blocks resident.

``pytest bench/bench_match.py``; KVBM_BENCH_BLOCKS changes the number of resident blocks. Groups are
the length of the match: all of the prefix, half of it, nothing. In each:

match
    `BlockTable.match` of another chain each time, so that index and blocks come from memory; with
    the pin. Digests are given, as the engine's block hashes.
match_again
    The same chain each time, with the return: `match` and `unpin`, all in the cache.
dict_walk, dict_walk_again
    The baseline, a walk over the same hashes with a look-up in a private dict of as many blocks,
    until the first that is missing; other chains and the same chain.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from bench.segments import BLOCKS, CHAIN, fill, hashes, leader, segment
from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable

ROUNDS = 2000


class Resident(NamedTuple):
    """What is cached, in the segment and in a dict."""

    table: OperationTable
    known: dict[bytes, int]
    chains: list[list[bytes]]


@pytest.fixture(scope="module")
def resident() -> Iterator[Resident]:
    with segment() as name:
        table = leader(name, 1)
        chains = [hashes(CHAIN) for _ in range(BLOCKS // CHAIN)]
        for chain in chains:
            fill(table, Keys(chain))
        known = {block: i for chain in chains for i, block in enumerate(chain)}
        assert len(known) == BLOCKS - BLOCKS % CHAIN
        yield Resident(table, known, chains)
        table.segment.close()


@pytest.fixture(params=["all", "half", "nothing"])
def asked(request: pytest.FixtureRequest, resident: Resident, benchmark: Any) -> list[list[bytes]]:
    """Return prefixes to ask about, each of the length of a chain, in a random order."""
    benchmark.group = f"{CHAIN} blocks of {BLOCKS}, hit: {request.param}"
    keep = {"all": CHAIN, "half": CHAIN // 2, "nothing": 0}[request.param]
    source = random.Random(1)
    chains = source.sample(resident.chains, min(200, len(resident.chains)))
    return [[*chain[:keep], *hashes(CHAIN - keep)] for chain in chains]


def hit_of(asked: list[list[bytes]], resident: Resident) -> int:
    return walk(resident.known, asked[0])


def walk(known: dict[bytes, int], chain: list[bytes]) -> int:
    """Return the length of the longest prefix in the dict."""
    for i, block in enumerate(chain):
        if block not in known:
            return i
    return len(chain)


def test_match(benchmark: Any, resident: Resident, asked: list[list[bytes]]) -> None:
    turns = [Keys(chain) for chain in asked]
    table = resident.table
    held: list[int | None] = [None]

    def other() -> tuple[tuple[Keys], dict[str, Any]]:
        if held[0] is not None:
            table.unpin(held[0])
        turns.append(turns.pop(0))
        return (turns[0],), {}

    def match(keys: Keys) -> int:
        count, held[0] = table.match(keys, 0, CHAIN)
        return count

    count = benchmark.pedantic(match, setup=other, rounds=ROUNDS)
    other()
    assert count == hit_of(asked, resident)
    assert table.held() == {}


def test_match_again(benchmark: Any, resident: Resident, asked: list[list[bytes]]) -> None:
    keys = Keys(asked[0])
    table = resident.table

    def match() -> int:
        count, ref = table.match(keys, 0, CHAIN)
        if ref is not None:
            table.unpin(ref)
        return count

    assert benchmark(match) == hit_of(asked, resident)


def test_dict_walk(benchmark: Any, resident: Resident, asked: list[list[bytes]]) -> None:
    turns = list(asked)

    def other() -> tuple[tuple[dict[bytes, int], list[bytes]], dict[str, Any]]:
        turns.append(turns.pop(0))
        return (resident.known, turns[0]), {}

    count = benchmark.pedantic(walk, setup=other, rounds=ROUNDS // 10)
    assert count == hit_of(asked, resident)


def test_dict_walk_again(benchmark: Any, resident: Resident, asked: list[list[bytes]]) -> None:
    assert benchmark(walk, resident.known, asked[0]) == hit_of(asked, resident)
