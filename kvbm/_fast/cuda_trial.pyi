# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

from kvbm._fast.cuda_backend import CudaBackend

def copy_both(
    backend: CudaBackend,
    group: int,
    stores: Sequence[tuple[int, int]],
    loads: Sequence[tuple[int, int]],
) -> int: ...
