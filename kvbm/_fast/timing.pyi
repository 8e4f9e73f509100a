# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

from typing_extensions import disjoint_base

from kvbm._fast.segment import Segment

OPERATION_KINDS: dict[int, str]

class Histogram(NamedTuple):
    buckets: tuple[int, ...]
    sum_ns: int

class Latencies(NamedTuple):
    total: Histogram
    copy: Histogram

@disjoint_base
class CallTime:
    def __new__(cls, segment: Segment) -> CallTime: ...
    def __enter__(self) -> None: ...
    def __exit__(self, kind: object, error: object, traceback: object) -> None: ...

def worker_latencies(segment: Segment, leader: int, rank: int) -> dict[str, Latencies]: ...
def thread_cpu_time_ns() -> int: ...
