# SPDX-License-Identifier: Apache-2.0
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self, disjoint_base

from kvbm._fast.segment import Segment

AGES: int
CLASSES: int
USES_KNOWN: int
AGE_STARTS: list[int]

@disjoint_base
class Uses:
    def __new__(cls, segment: Segment) -> Self: ...
    @property
    def blocks(self) -> int: ...
    @property
    def last(self) -> int: ...
    def now(self) -> int: ...
    def classify(self, use: int, rank_class: int) -> None: ...
    def set_ranks(self, ranks: NDArray[np.uint8]) -> None: ...
