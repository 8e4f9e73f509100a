# SPDX-License-Identifier: Apache-2.0
"""One batch of events as each minor version of vLLM writes it: ``golden/vllm.json``.

The events are the same in all: what a version's classes have no field for is left away. ``python -m
tests.events.vllm_batches`` prints the batch of the vLLM that is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

GOLDEN = Path(__file__).with_name("golden") / "vllm.json"
HASH = b"\x09" * 24 + (12).to_bytes(8, "big")

# Class and fields. The first has a value in each field, the third one without a group.
EVENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "BlockStored",
        {
            "block_hashes": [10, 2**64 - 1, HASH],
            "parent_block_hash": b"\x01" * 32,
            "token_ids": [1, 200, 70000, 4, 5, 6],
            "block_size": 2,
            "lora_id": 1,
            "medium": "GPU",
            "lora_name": "l1",
            "extra_keys": [("l1", "salt"), None, ("l1",)],
            "group_idx": 1,
            "kv_cache_spec_kind": "sliding_window",
            "kv_cache_spec_sliding_window": 128,
            "locality": "LOCAL",
            "ownership": "tier",
            "session_id": "s",
        },
    ),
    (
        "BlockStored",
        {
            "block_hashes": [7],
            "parent_block_hash": None,
            "token_ids": [1, 2],
            "block_size": 2,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": None,
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        },
    ),
    (
        "BlockStored",
        {
            "block_hashes": [8],
            "parent_block_hash": 7,
            "token_ids": [3, 4],
            "block_size": 2,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "kv_cache_spec_sliding_window": 128,
        },
    ),
    (
        "BlockRemoved",
        {"block_hashes": [10, 2**64 - 1], "medium": "GPU", "group_idx": 1, "locality": "LOCAL"},
    ),
    (
        "BlockRemoved",
        {"block_hashes": [7], "medium": "CPU", "group_idx": 0, "locality": "REMOTE"},
    ),
    ("AllBlocksCleared", {}),
)


def golden() -> dict[str, bytes]:
    """Payload by minor version, as "0.32"."""
    found = json.loads(GOLDEN.read_text())
    return {version: bytes.fromhex(one["payload"]) for one in found for version in one["vllm"]}


def batch_of(kv_events: ModuleType) -> bytes:
    """The payload that a version's `vllm.distributed.kv_events` makes of the events."""
    import msgspec

    made = []
    for name, fields in EVENTS:
        kind = getattr(kv_events, name)
        made.append(kind(**{k: v for k, v in fields.items() if k in kind.__struct_fields__}))
    batch = kv_events.KVEventBatch(ts=1.5, events=made, data_parallel_rank=2)
    payload: bytes = msgspec.msgpack.encode(batch)
    return payload


if __name__ == "__main__":
    from vllm.distributed import kv_events

    print(batch_of(kv_events).hex())
