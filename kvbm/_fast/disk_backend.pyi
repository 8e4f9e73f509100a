# SPDX-License-Identifier: Apache-2.0
from typing import Protocol

from typing_extensions import Self, disjoint_base

from kvbm._fast.backend import CopyBackend
from kvbm._fast.copy import HostCopier
from kvbm._fast.segment import Segment

PROBLEMS: dict[int, str]

class _Layout(Protocol):
    @property
    def slots(self) -> int: ...
    @property
    def table_offset(self) -> int: ...
    @property
    def data_offset(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...

@disjoint_base
class DiskBackend(CopyBackend):
    def __new__(
        cls,
        segment: Segment,
        copiers: list[HostCopier],
        *,
        data_fd: int,
        table_fd: int,
        layout: _Layout,
        fingerprint: int,
        durable: bool,
        alignment: int = 4096,
        calls: tuple[int, int, int] | None = None,
    ) -> Self: ...
    def serve(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def serving(self) -> int: ...
    @property
    def bounces(self) -> bool: ...
    def problems(self) -> tuple[int, int, int]: ...
