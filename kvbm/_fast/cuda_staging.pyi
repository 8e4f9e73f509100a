# SPDX-License-Identifier: Apache-2.0
from typing_extensions import Self, disjoint_base

from kvbm._fast.cuda_device import CudaDevice

@disjoint_base
class CudaStaging:
    def __new__(cls, device: CudaDevice, buffer_bytes: int, streams: int) -> Self: ...
    @property
    def total_bytes(self) -> int: ...
    def close(self) -> None: ...
