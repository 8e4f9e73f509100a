# SPDX-License-Identifier: Apache-2.0
"""Names that upstream's binary module has and that mean something here; see docs/upstream.md."""

from kvbm.block_manager import BlockManager
from kvbm.block_manager.block import Block, BlockList, Layer
from kvbm.block_manager.pool import BlockPoolStatus, ResetBlocksResponse
from kvbm.controller import BlockManagerClient
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
