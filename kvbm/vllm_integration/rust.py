# SPDX-License-Identifier: Apache-2.0
"""Upstream's shim over its binary, for code that imports names from here.

As upstream's, it never raises: a name that is not available is None. `BlockManager` always is;
`KvConnectorLeader` and `KvConnectorWorker` are with vLLM. The others are arguments and results of
calls between upstream's Python and its binary, or of a cache manager that upstream itself calls
dead, and are always None here; docs/upstream.md has each name.
"""

import logging
from typing import Any

from kvbm.block_manager import BlockManager

__all__ = [
    "BlockManager",
    "BlockState",
    "BlockStates",
    "KvConnectorLeader",
    "KvConnectorWorker",
    "KvbmBlockList",
    "KvbmCacheManager",
    "KvbmRequest",
    "SchedulerOutput",
    "SlotUpdate",
]

logger = logging.getLogger(__name__)

KvConnectorLeader: Any = None
KvConnectorWorker: Any = None
try:
    from kvbm.vllm_integration.connector_leader import KvConnectorLeader
    from kvbm.vllm_integration.connector_worker import KvConnectorWorker
except ImportError as error:
    logger.warning("vLLM is not available, its integration is not either: %s", error)

BlockState: Any = None
BlockStates: Any = None
KvbmBlockList: Any = None
KvbmCacheManager: Any = None
KvbmRequest: Any = None
SchedulerOutput: Any = None
SlotUpdate: Any = None
