# SPDX-License-Identifier: Apache-2.0
from typing_extensions import Self, disjoint_base

from kvbm._fast.cuda_device import CudaDevice

@disjoint_base
class CudaMarks:
    def __new__(cls, device: CudaDevice) -> Self: ...
    def close(self) -> None: ...
