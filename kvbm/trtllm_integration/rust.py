# SPDX-License-Identifier: Apache-2.0
"""Upstream's shim over its binary, for code that imports names from here.

As upstream's, it never raises: a name that is not available is None. `KvConnectorLeader` and
`KvConnectorWorker` are there with TensorRT-LLM. The others are arguments and results of calls
between upstream's Python and its binary, and are always None here.
"""

import logging
from typing import Any

__all__ = [
    "BlockState",
    "BlockStates",
    "KvConnectorLeader",
    "KvConnectorWorker",
    "KvbmBlockList",
    "KvbmRequest",
    "SchedulerOutput",
    "SlotUpdate",
]

logger = logging.getLogger(__name__)

KvConnectorLeader: Any = None
KvConnectorWorker: Any = None
try:
    from kvbm.trtllm_integration.connector_leader import KvConnectorLeader
    from kvbm.trtllm_integration.connector_worker import KvConnectorWorker
except ImportError as error:
    logger.warning("TensorRT-LLM is not available, its integration is not either: %s", error)

BlockState: Any = None
BlockStates: Any = None
KvbmBlockList: Any = None
KvbmRequest: Any = None
SchedulerOutput: Any = None
SlotUpdate: Any = None
