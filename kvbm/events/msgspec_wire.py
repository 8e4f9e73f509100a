# SPDX-License-Identifier: Apache-2.0
"""Events as bytes: written as upstream writes them, read from upstream and engines.

A payload is a MessagePack array, ``[timestamp, [event, ...], data-parallel rank]``. Written events
are maps with a "type" first, one block a ``BlockStored``. What is read may also be a positional
array (vLLM's ``array_like`` structs before 0.24), may hold several blocks, may end early and may
have fields that nobody here knows. ``docs/events.md`` has the format with an example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kvbm.events.model import MASK64, Batch, Cleared, Event, Removed, Stored

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder()

STORED_FIELDS = (
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
)
REMOVED_FIELDS = ("type", "block_hashes", "medium")
"""Positions of an event that is an array; what comes after them differs between versions."""


def encode_batch(batch: Batch) -> bytes:
    """Payload of one message."""
    events = [_fields(event) for event in batch.events]
    payload: bytes = _ENCODER.encode([batch.timestamp, events, batch.rank])
    return payload


def _fields(event: Event) -> dict[str, Any]:
    if isinstance(event, Stored):
        fields: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": [event.block_hash],
            "parent_block_hash": event.parent_hash,
            "token_ids": event.token_ids,
            "block_size": len(event.token_ids),
        }
        if event.lora_name is not None:
            fields["lora_name"] = event.lora_name
    elif isinstance(event, Removed):
        fields = {"type": "BlockRemoved", "block_hashes": event.block_hashes}
    else:
        return {"type": "AllBlocksCleared"}
    if event.medium is not None:
        fields["medium"] = event.medium
    return fields


def decode_batch(payload: bytes) -> Batch:
    """Read a payload; events that make no sense are left out and named.

    Raises
    ------
    ValueError
        It is no batch at all.
    """
    try:
        decoded = _DECODER.decode(payload)
    except msgspec.DecodeError as error:
        raise ValueError(f"a payload of {len(payload)} bytes is no MessagePack: {error}") from None
    if not isinstance(decoded, list) or len(decoded) < 2 or not isinstance(decoded[1], list):
        raise ValueError("a payload is no array of time and events")
    events: list[Event] = []
    problems: list[str] = []
    for fields in decoded[1]:
        try:
            events += _events(_named(fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"{type(error).__name__}: {error}")
    rank = decoded[2] if len(decoded) > 2 and isinstance(decoded[2], int) else 0
    return Batch(float(decoded[0]), tuple(events), rank, tuple(problems))


def _named(fields: Any) -> Mapping[str, Any]:
    """Fields by name, also of an event that is an array."""
    if isinstance(fields, Mapping):
        return fields
    if not isinstance(fields, Sequence) or isinstance(fields, str | bytes) or not fields:
        raise ValueError("an event is neither a map nor an array")
    names = STORED_FIELDS if fields[0] == "BlockStored" else REMOVED_FIELDS
    tail = fields[len(names) :]
    named = dict(zip(names, fields, strict=False))
    # The group is the tail's first, or second behind what is said of images; a number further
    # behind is a window. The word REMOTE is the locality.
    named["group_idx"] = next((item for item in tail[:2] if isinstance(item, int)), None)
    named["block_mm_infos"] = tail[0] if tail and isinstance(tail[0], list) else None
    named["locality"] = "REMOTE" if "REMOTE" in tail else None
    return named


def _events(fields: Mapping[str, Any]) -> Iterator[Event]:
    kind = fields["type"]
    if kind == "AllBlocksCleared":
        yield Cleared()
        return
    if kind not in ("BlockStored", "BlockRemoved"):
        raise ValueError(f"an event of type {kind!r} is not known")
    if (fields.get("locality") or "LOCAL") != "LOCAL":
        return
    hashes = [_hash64(value) for value in fields["block_hashes"]]
    medium, group = fields.get("medium"), fields.get("group_idx") or 0
    if kind == "BlockRemoved":
        yield Removed(tuple(hashes), medium, group)
    else:
        yield from _stored(fields, hashes, medium, group)


def _stored(
    fields: Mapping[str, Any], hashes: Sequence[int], medium: str | None, group: int
) -> Iterable[Stored]:
    size, tokens = fields["block_size"], fields["token_ids"]
    if size <= 0 or len(tokens) != size * len(hashes):
        raise ValueError(f"{len(hashes)} blocks of {size} tokens with {len(tokens)} tokens")
    nothing = [None] * len(hashes)
    extra, images = (fields.get(name) or nothing for name in ("extra_keys", "block_mm_infos"))
    if len(extra) != len(hashes) or len(images) != len(hashes):
        raise ValueError(f"{len(hashes)} blocks with extra keys for {len(extra)}, {len(images)}")
    parent = fields.get("parent_block_hash")
    found = []
    before = None if parent is None else _hash64(parent)
    for number, value in enumerate(hashes):
        chunk = tuple(tokens[number * size : (number + 1) * size])
        keys = tuple(extra[number] or ()) + ((images[number],) if images[number] else ())
        found.append(Stored(value, before, chunk, fields.get("lora_name"), medium, group, keys))
        before = value
    return found


def _hash64(value: int | bytes) -> int:
    """A hash as 64 bits: numbers modulo 2^64, of bytes the last eight, as vLLM shortens them."""
    return int.from_bytes(value[-8:], "big") if isinstance(value, bytes) else value & MASK64
