# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

SLAB_HEADER: np.dtype[Any]
EMPTY: int
VALID: int
TORN: int
FOREIGN: int

def allocate_file(fd: int, count: int) -> int: ...
def valid_headers(
    table: Buffer, *, first: int = 0, rank: int, fingerprint: int, payload_bytes: int
) -> NDArray[np.void]: ...
def header_conditions(
    table: Buffer, *, first: int = 0, rank: int, fingerprint: int, payload_bytes: int
) -> NDArray[np.uint8]: ...
