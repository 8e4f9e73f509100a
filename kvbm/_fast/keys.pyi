# SPDX-License-Identifier: Apache-2.0
from typing_extensions import disjoint_base

from kvbm._fast.hashing import DigestChain

@disjoint_base
class Keys:
    def __init__(
        self,
        source: list[bytes] | DigestChain,
        stride: int = 1,
        group: int = 0,
        mix: bytes = ...,
    ) -> None: ...
    @property
    def use(self) -> int: ...
    def __len__(self) -> int: ...
    def identity(self, index: int, epoch: int = 0) -> tuple[bytes, int]: ...
    def sequence_hashes(self, start: int, stop: int) -> bytes: ...
