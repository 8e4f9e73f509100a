# SPDX-License-Identifier: Apache-2.0
"""Names that upstream's binary module has and that mean something here; see docs/upstream.md."""

from kvbm.block import Block, BlockList, Layer
from kvbm.block_manager import BlockManager
from kvbm.controller import BlockManagerClient
from kvbm.pool import BlockPoolStatus, ResetBlocksResponse
from kvbm.standalone import KvbmLeader, KvbmWorker

__all__ = [
    "Block",
    "BlockList",
    "BlockManager",
    "BlockManagerClient",
    "BlockPoolStatus",
    "KvbmLeader",
    "KvbmWorker",
    "Layer",
    "ResetBlocksResponse",
]
