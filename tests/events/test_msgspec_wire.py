# SPDX-License-Identifier: Apache-2.0
"""The wire format: upstream's bytes are written, those of upstream and of every vLLM are read."""

from __future__ import annotations

from typing import Any

import pytest

msgspec = pytest.importorskip("msgspec")

from kvbm.events.model import Batch, Cleared, Removed, Stored  # noqa: E402
from kvbm.events.msgspec_wire import decode_batch, encode_batch  # noqa: E402

HASH = 0xFFFF_FFFF_FFFF_FFFF
# Written by hand from the MessagePack specification: 82 a map of two, a4 a text of four bytes,
# 9x an array, cf an unsigned number of 64 bits, c0 nil, cb a double.
GOLDEN = {
    "stored": (
        Stored(HASH, None, (1, 200, 70000, 4), None, "CPU_TIER1"),
        "86" + "a4" + b"type".hex() + "ab" + b"BlockStored".hex()
        + "ac" + b"block_hashes".hex() + "91" + "cf" + "ff" * 8
        + "b1" + b"parent_block_hash".hex() + "c0"
        + "a9" + b"token_ids".hex() + "94" + "01" + "ccc8" + "ce00011170" + "04"
        + "aa" + b"block_size".hex() + "04"
        + "a6" + b"medium".hex() + "a9" + b"CPU_TIER1".hex(),
    ),
    "stored with adapter": (
        Stored(5, 6, (1,), "l1", "GPU"),
        "87" + "a4" + b"type".hex() + "ab" + b"BlockStored".hex()
        + "ac" + b"block_hashes".hex() + "91" + "05"
        + "b1" + b"parent_block_hash".hex() + "06"
        + "a9" + b"token_ids".hex() + "91" + "01"
        + "aa" + b"block_size".hex() + "01"
        + "a9" + b"lora_name".hex() + "a2" + b"l1".hex()
        + "a6" + b"medium".hex() + "a3" + b"GPU".hex(),
    ),
    "removed": (
        Removed((7, 256), "CPU_TIER2"),
        "83" + "a4" + b"type".hex() + "ac" + b"BlockRemoved".hex()
        + "ac" + b"block_hashes".hex() + "92" + "07" + "cd0100"
        + "a6" + b"medium".hex() + "a9" + b"CPU_TIER2".hex(),
    ),
    "cleared": (Cleared(), "81" + "a4" + b"type".hex() + "b0" + b"AllBlocksCleared".hex()),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_events_have_upstreams_bytes(name: str) -> None:
    event, expected = GOLDEN[name]
    payload = encode_batch(Batch(1.5, (event,), 3))
    assert payload.hex() == "93" + "cb3ff8000000000000" + "91" + expected + "03"


@pytest.mark.parametrize("name", GOLDEN)
def test_what_was_written_is_read(name: str) -> None:
    batch = Batch(1.5, (GOLDEN[name][0],), 3)
    assert decode_batch(encode_batch(batch)) == batch


def payload(*events: Any, rank: tuple[int, ...] = (2,)) -> bytes:
    """A batch with these events."""
    return msgspec.msgpack.encode([1.5, list(events), *rank])


STORED = {
    "type": "BlockStored",
    "block_hashes": [10, -1, b"\x09" * 24 + (12).to_bytes(8, "big")],
    "parent_block_hash": b"\x01" * 32,
    "token_ids": [1, 2, 3, 4, 5, 6],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": "l1",
    "extra_keys": [["l1", "salt"], None, ["l1"]],
    "group_idx": 1,
}
PARENT = int.from_bytes(b"\x01" * 8, "big")
READ = (
    Stored(10, PARENT, (1, 2), "l1", "GPU", 1, ("l1", "salt")),
    Stored(2**64 - 1, 10, (3, 4), "l1", "GPU", 1),
    Stored(12, 2**64 - 1, (5, 6), "l1", "GPU", 1, ("l1",)),
)


def test_an_event_of_several_blocks_becomes_one_each() -> None:
    assert decode_batch(payload(STORED)) == Batch(1.5, READ, 2)


def test_an_event_may_be_an_array() -> None:
    values = [STORED[name] for name in STORED if name not in ("group_idx",)]
    tail = [[None, {"mm": 1}, None], 1, "full_attention", 128]  # images, group, kind, window
    image = READ[1]._replace(extra_keys=({"mm": 1},))
    assert decode_batch(payload(values + tail)).events == (READ[0], image, READ[2])
    removed = ["BlockRemoved", [10, -1], "GPU", 1, "full_attention"]
    assert decode_batch(payload(removed)).events == (Removed((10, 2**64 - 1), "GPU", 1),)
    assert decode_batch(payload(["AllBlocksCleared"])).events == (Cleared(),)


def test_an_array_may_end_early() -> None:
    old = ["BlockStored", [1], None, [7, 8], 2, None]
    assert decode_batch(payload(old)).events == (Stored(1, None, (7, 8)),)
    assert decode_batch(payload(["BlockRemoved", [1]])).events == (Removed((1,)),)


def test_a_batch_may_have_no_rank() -> None:
    assert decode_batch(payload(rank=())) == Batch(1.5, ())


def test_blocks_on_another_machine_are_not_the_engines() -> None:
    remote = STORED | {"locality": "REMOTE"}
    assert decode_batch(payload(remote, STORED | {"locality": "LOCAL"})).events == READ
    values = ["BlockRemoved", [1], "GPU", 0, None, None, "REMOTE"]
    assert decode_batch(payload(values)).events == ()


@pytest.mark.parametrize(
    "event",
    [
        STORED | {"block_size": 0},
        STORED | {"token_ids": [1, 2, 3]},
        STORED | {"extra_keys": [None]},
        STORED | {"block_mm_infos": [None]},
        STORED | {"block_hashes": ["text"]},
        {"type": "BlockMoved"},
        {"block_hashes": [1]},
        [],
        7,
        None,
        {"type": "BlockRemoved"},
    ],
)
def test_an_event_that_makes_no_sense_is_left_out_and_named(event: Any) -> None:
    batch = decode_batch(payload(event, ["AllBlocksCleared"]))
    assert batch.events == (Cleared(),)
    assert len(batch.problems) == 1


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x01", b"\x90", msgspec.msgpack.encode([1.0, 2])])
def test_what_is_no_batch_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="payload"):
        decode_batch(data)
