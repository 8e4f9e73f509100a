# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from typing_extensions import Buffer, Self, disjoint_base

RUN_BYTES: int

class CopyStatus(IntEnum):
    OK = 0
    STOPPED = 1
    BAD_BLOCK = 2
    BAD_SLOT = 3
    BAD_HEADER = 4
    TORN = 5
    NO_CHECKSUM = 6
    BAD_CHECKSUM = 7

class CopyResult(NamedTuple):
    status: CopyStatus
    row: int

class _Layout(Protocol):
    @property
    def slots(self) -> int: ...
    @property
    def group_slots(self) -> int: ...
    @property
    def table_offset(self) -> int: ...
    @property
    def data_offset(self) -> int: ...
    @property
    def group_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def chunk_bytes(self) -> Sequence[int]: ...

@disjoint_base
class HostCopier:
    def __new__(
        cls,
        regions: Sequence[tuple[int, int, int]],
        layout: _Layout,
        arena: Buffer,
        *,
        device_blocks: int,
        rank: int = 0,
        group: int = 0,
        run_bytes: int = ...,
        keep_alive: object = None,
    ) -> Self: ...
    @property
    def usable_slots(self) -> int: ...
    @usable_slots.setter
    def usable_slots(self, count: int) -> None: ...
    def store(
        self, rows: Any, digests: Any, *, checksum: bool = False, stop: Any = None
    ) -> CopyResult: ...
    def load(
        self, rows: Any, digests: Any, *, checksum: bool = False, stop: Any = None
    ) -> CopyResult: ...
