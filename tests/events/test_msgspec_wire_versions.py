# SPDX-License-Identifier: Apache-2.0
"""Batches of each minor version of vLLM, byte for byte as its own classes write them, are read.

That the installed vLLM writes these bytes is tested beside vLLM
(tests/vllm_integration/test_consolidator_config_bytes.py), so on each version by
`make test-versions`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec")

from kvbm.events.model import Batch, Cleared, Removed, Stored
from kvbm.events.msgspec_wire import decode_batch
from tests.events.vllm_batches import golden

PARENT = int.from_bytes(b"\x01" * 8, "big")
READ = (
    Stored(10, PARENT, (1, 200), "l1", "GPU", 1, ("l1", "salt")),
    Stored(2**64 - 1, 10, (70000, 4), "l1", "GPU", 1),
    Stored(12, 2**64 - 1, (5, 6), "l1", "GPU", 1, ("l1",)),
    Stored(7, None, (1, 2), None, "GPU"),
    Stored(8, 7, (3, 4), None, "GPU"),
    Removed((10, 2**64 - 1), "GPU", 1),
    Removed((7,), "CPU"),  # REMOTE where the version can say so, and then not the engine's
    Cleared(),
)
WITHOUT_LOCALITY = ("0.20", "0.21", "0.22", "0.23", "0.24", "0.25")


@pytest.mark.parametrize("version", golden())
def test_the_batch_of_each_version_is_read_as_the_same_events(version: str) -> None:
    events = READ if version in WITHOUT_LOCALITY else (*READ[:-2], READ[-1])
    assert decode_batch(golden()[version]) == Batch(1.5, events, 2)


def test_each_minor_version_that_is_supported_has_a_batch() -> None:
    assert list(golden()) == [f"0.{minor}" for minor in range(20, 33)]


# What the ZMQ publisher of Dynamo 1.x's `dynamo.trtllm` makes of TensorRT-LLM's events: maps, one a
# batch, without a medium; hashes are signed; blocks with images have them in `block_mm_infos`; the
# rank is that of attention data parallelism. Before it knew adapters by name it wrote a `lora_id`.
TRTLLM_STORED = (
    "93" + "cb3ff8000000000000" + "91" + "87"
    + "a4" + b"type".hex() + "ab" + b"BlockStored".hex()
    + "ac" + b"block_hashes".hex() + "92" + "ff" + "d3" + "8000000000000000"
    + "b1" + b"parent_block_hash".hex() + "fe"
    + "a9" + b"token_ids".hex() + "94" + "01020304"
    + "aa" + b"block_size".hex() + "02"
    + "a9" + b"lora_name".hex() + "a2" + b"l1".hex()
    + "ae" + b"block_mm_infos".hex() + "92" + "c0"
    + "81" + "aa" + b"mm_objects".hex() + "91" + "82"
    + "a7" + b"mm_hash".hex() + "05" + "a7" + b"offsets".hex() + "90"
    + "03"
)  # fmt: skip
TRTLLM_OLDER = (
    "93" + "cb3ff8000000000000" + "91" + "86"
    + "a4" + b"type".hex() + "ab" + b"BlockStored".hex()
    + "ac" + b"block_hashes".hex() + "91" + "07"
    + "b1" + b"parent_block_hash".hex() + "c0"
    + "a9" + b"token_ids".hex() + "92" + "0102"
    + "aa" + b"block_size".hex() + "02"
    + "a7" + b"lora_id".hex() + "c0"
    + "00"
)  # fmt: skip
TRTLLM_REMOVED = (
    "93" + "cb3ff8000000000000" + "91" + "82"
    + "a4" + b"type".hex() + "ac" + b"BlockRemoved".hex()
    + "ac" + b"block_hashes".hex() + "92" + "ff" + "07"
    + "03"
)  # fmt: skip


def test_the_batches_of_tensorrt_llm_are_read() -> None:
    image = {"mm_objects": [{"mm_hash": 5, "offsets": []}]}
    stored = (
        Stored(2**64 - 1, 2**64 - 2, (1, 2), "l1"),
        Stored(2**63, 2**64 - 1, (3, 4), "l1", extra_keys=(image,)),
    )
    assert decode_batch(bytes.fromhex(TRTLLM_STORED)) == Batch(1.5, stored, 3)
    assert decode_batch(bytes.fromhex(TRTLLM_OLDER)) == Batch(1.5, (Stored(7, None, (1, 2)),))
    removed = Removed((2**64 - 1, 7))
    assert decode_batch(bytes.fromhex(TRTLLM_REMOVED)) == Batch(1.5, (removed,), 3)
