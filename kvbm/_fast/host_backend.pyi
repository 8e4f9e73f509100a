# SPDX-License-Identifier: Apache-2.0
from typing_extensions import Self, disjoint_base

from kvbm._fast.backend import CopyBackend
from kvbm._fast.copy import HostCopier

@disjoint_base
class HostBackend(CopyBackend):
    def __new__(cls, copiers: list[HostCopier], *, checksum: bool = False) -> Self: ...
