# SPDX-License-Identifier: Apache-2.0
from typing import Any

DEVICE_CPU: int
DEVICE_CUDA: int
DEVICE_CUDA_HOST: int

def capsule(
    address: int,
    shape: tuple[int, ...],
    dtype: tuple[int, int],
    device: tuple[int, int],
    owner: object,
) -> Any: ...
