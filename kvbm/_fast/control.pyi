# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

from kvbm._fast.keys import Keys
from kvbm._fast.segment import Segment
from kvbm._fast.table import BlockTable

TIERS: dict[str, int]

class Census(NamedTuple):
    total: int
    filling: int
    active: int
    inactive: int
    @property
    def empty(self) -> int: ...

def census(segment: Segment, tier: str) -> Census: ...
def find_registered(segment: Segment, sequence_hashes: list[int]) -> dict[int, list[int]]: ...
def evict_subtrees(table: BlockTable, refs: list[int]) -> int: ...
def identify(
    table: BlockTable,
    ref: int,
    keys: Keys,
    index: int,
    parent: int | None = None,
    priority: int = 0,
) -> bool: ...
