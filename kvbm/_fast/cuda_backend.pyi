# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

from typing_extensions import Self, disjoint_base

from kvbm._fast.backend import CopyBackend
from kvbm._fast.copy import HostCopier
from kvbm._fast.cuda_device import CudaDevice

@disjoint_base
class CudaBackend(CopyBackend):
    def __new__(
        cls,
        device: CudaDevice,
        copiers: list[HostCopier],
        methods: Sequence[Any],
        *,
        checksum: bool = False,
    ) -> Self: ...
    @property
    def is_switched_off(self) -> bool: ...
    @property
    def staging_bytes(self) -> int: ...
    def statistics(self) -> dict[str, int]: ...
