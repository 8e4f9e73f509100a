# SPDX-License-Identifier: Apache-2.0
from typing_extensions import Self, disjoint_base

from kvbm._fast.keys import Keys
from kvbm._fast.segment import Segment
from kvbm._fast.table import BlockTable

PARENT_SECS: float

@disjoint_base
class OperationTable(BlockTable):
    def __new__(cls, segment: Segment) -> Self: ...
    def store(
        self,
        keys: Keys,
        start: int,
        stop: int,
        device_blocks: list[int],
        parent: int | None,
        step: int,
        request_key: int = 0,
        priority: int = 0,
    ) -> tuple[list[int], int, int | None]: ...
    def load(
        self,
        ref: int,
        skip: int,
        device_blocks: list[int],
        step: int,
        request_key: int = 0,
        group: int = 0,
    ) -> list[int] | None: ...
    def fetch(
        self,
        keys: Keys,
        start: int,
        stop: int,
        disk_slots: list[int],
        parent: int | None,
        request_key: int = 0,
    ) -> tuple[list[int], int, int | None]: ...
    def spill(
        self, ref: int, skip: int, disk_slots: list[int], group: int = 0
    ) -> list[int] | None: ...
    def collect(self, handle: int) -> bool | None: ...
    def cancel(self, handle: int) -> None: ...
    def hold(self, keys: Keys, index: int) -> int | None: ...
    def filling(self, keys: Keys, start: int, stop: int) -> tuple[int, int | None]: ...
    def first_failed_row(self, handle: int) -> int: ...
    def free_operations(self) -> int: ...
