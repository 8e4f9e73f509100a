# SPDX-License-Identifier: Apache-2.0
"""Upstream's block API for Python, over the shared segment.

``manager``
    `BlockManager`: allocates blocks of the device and host pools.
``pool``, ``hold``
    One pool: who holds which place, what is cached, what may be reused.
``block``
    `Block`, `BlockList`, `Layer`: what a user of the API has in hand; DLPack.
``memory``, ``torch_memory``
    Where the bytes are.
"""

from kvbm.block_manager.manager import BlockManager

__all__ = ["BlockManager"]
