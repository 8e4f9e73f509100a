# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

from kvbm._fast.segment import Segment

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
def claim_worker(segment: Segment, leader: int, rank: int) -> None: ...
def find_leader(segment: Segment, engine_key: int) -> int | None: ...
def take_line(segment: Segment, line: int) -> bool: ...
def workers_are_gone(segment: Segment, leader: int) -> bool: ...
def clear_rings(segment: Segment, leader: int) -> None: ...
def mark_line(segment: Segment, line: int, role: int, leader: int, engine_key: int) -> None: ...
def participants(segment: Segment) -> list[Participant]: ...
