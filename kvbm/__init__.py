# SPDX-License-Identifier: Apache-2.0
"""KV-cache block manager for LLM engines: past prompts in host memory, over a shared segment.

`BlockManager`, `KvbmLeader` and `KvbmWorker` are imported when they are asked for: `import kvbm`
alone loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbm.block_manager import BlockManager
    from kvbm.standalone import KvbmLeader, KvbmWorker

__all__ = ["BlockManager", "KvbmLeader", "KvbmWorker"]

_HOMES = {
    "BlockManager": "kvbm.block_manager",
    "KvbmLeader": "kvbm.standalone",
    "KvbmWorker": "kvbm.standalone",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvbm' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
