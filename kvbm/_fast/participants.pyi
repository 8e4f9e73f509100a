# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

from kvbm._fast.segment import Segment

COUNTER_NAMES: tuple[str, ...]
ROLES: dict[int, str]

class Participant(NamedTuple):
    line: int
    role: str
    leader: int
    rank: int | None
    pid: int
    epoch: int
    started_ns: int
    engine_key: int
    alive: bool
    inside: bool
    step_bound: int
    step_filled: int

def line_is_alive(segment: Segment, line: int) -> bool: ...
def claim_leader(segment: Segment, engine_key: int) -> int: ...
def claim_worker(
    segment: Segment, leader: int, rank: int, engine_key: int | None = None
) -> None: ...
def find_leader(segment: Segment, engine_key: int) -> int | None: ...
def participants(segment: Segment) -> list[Participant]: ...
def set_attached(segment: Segment) -> None: ...
def workers_attached(segment: Segment) -> bool: ...
def engine_counters(segment: Segment) -> dict[str, int]: ...
def set_disk_slots(segment: Segment, count: int) -> None: ...
def usable_disk_slots(segment: Segment) -> int: ...
