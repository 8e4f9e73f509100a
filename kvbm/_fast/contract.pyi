# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

from numpy.typing import NDArray

from kvbm._fast.segment import Shape

class Field(NamedTuple):
    name: str
    offset: int
    size: int
    length: int

class Record(NamedTuple):
    size: int
    fields: tuple[Field, ...]

class Section(NamedTuple):
    offset: int
    length: int
    record: str

RECORDS: dict[str, Record]
BITS: dict[str, dict[str, int]]
BLOCK_STATES: dict[int, str]
PLACEMENT_STATES: dict[int, str]
OPERATION_STATES: dict[int, str]
OPERATION_KINDS: dict[int, str]
RANK_STATES: dict[int, str]
ROLES: dict[int, str]
LATENCIES: dict[int, str]
TIERS: dict[int, str]
POOLS: dict[int, str]
MAGIC: int
FORMAT_VERSION: int
LAYOUT_CHECK: int
PAGE_BYTES: int
LEADERS: int
RANKS: int
LINES: int
OPERATIONS_PER_LEADER: int
ROWS: int
BUCKET_ENTRIES: int
LATENCY_BOUNDS_NS: tuple[int, ...]
RECOVERY_LOCK_OFFSET: int

def line_lock_offset(line: int) -> int: ...
def worker_line(leader: int, rank: int) -> int: ...
def fixed_sections() -> dict[str, Section]: ...
def sections(shape: Shape) -> dict[str, Section]: ...
def index_places(
    lo: NDArray[Any],
    hi: NDArray[Any],
    buckets: int,
    tag: NDArray[Any],
    first: NDArray[Any],
    second: NDArray[Any],
) -> None: ...
def free_count(words: NDArray[Any]) -> int: ...
