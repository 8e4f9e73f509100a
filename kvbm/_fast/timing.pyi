# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

from kvbm._fast.segment import Segment

OPERATION_KINDS: dict[int, str]

class Histogram(NamedTuple):
    buckets: tuple[int, ...]
    sum_ns: int

class Latencies(NamedTuple):
    total: Histogram
    copy: Histogram

def worker_latencies(segment: Segment, leader: int, rank: int) -> dict[str, Latencies]: ...
def thread_cpu_time_ns() -> int: ...
