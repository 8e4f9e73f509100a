# SPDX-License-Identifier: Apache-2.0
"""Everything about one block: found by number, slot or digest."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from kvbm._fast import contract
from kvbm.errors import InspectError
from kvbm.inspect.decode import Segment
from kvbm.inspect.records import part
from kvbm.inspect.report import Row, block_row, operation_row
from kvbm.inspect.slab import CONDITIONS, SlabFacts

LISTED_MAX = 1000
SLOT_STATES = {0: "empty", 1: "filling", 2: "valid"}


def find(segment: Segment, reference: str) -> list[tuple[Segment, int]]:
    """Blocks that a reference means, in the tables of all tiers: table and number.

    Parameters
    ----------
    reference : str
        `block:N`, `slot:N`, `disk:N`, `digest:HEX`, or without a word: up to nine digits are a
        slot, of the host tier where there is one, anything else the begin of a digest.

    Raises
    ------
    InspectError
        It means nothing, or there is no such block.
    """
    word, found, value = reference.partition(":")
    if not found:
        value = reference.lower().removeprefix("0x")
        word = "slot" if re.fullmatch(r"[0-9]{1,9}", reference) else "digest"
    tables = [segment] if segment.disk is None else [segment, segment.disk]
    if word == "digest" and re.fullmatch(r"[0-9a-fA-F]{1,32}", value):
        chosen = [(table, n) for table in tables for n in _with_digest(table, value.lower())]
    elif word in ("block", "slot", "disk") and re.fullmatch(r"[0-9]{1,10}", value):
        table = segment.of_tier("disk" if word == "disk" else None)
        chosen = [(table, n) for n in _numbered(table, word, int(value))]
    else:
        raise InspectError(
            f"{reference} is not understood: a slot (17), the begin of a digest (8f3a...), "
            "or block:N, slot:N, disk:N, digest:HEX"
        )
    if not chosen:
        raise InspectError(f"{reference}: there is no such block")
    return chosen


def _numbered(table: Segment, word: str, number: int) -> list[int]:
    """The record, or the blocks with this slot."""
    blocks = table.blocks
    if word == "block":
        return [number] if number < len(blocks) else []
    if word == "disk" and not table.is_of_disk:
        return []
    named = (blocks.slot[:, 0] == number) & (blocks.placement_state[:, 0] != 0)
    return [int(n) for n in np.flatnonzero(named & (blocks.state != 0))]


def _with_digest(segment: Segment, prefix: str) -> list[int]:
    """Blocks whose digest begins so; those in the tree first."""
    blocks = segment.blocks
    whole = bytes.fromhex(prefix[: len(prefix) // 2 * 2])
    mask = np.ones(len(blocks), np.bool_)
    for place, byte in enumerate(whole):
        mask &= blocks.digests[:, place] == byte
    if len(prefix) % 2:
        mask &= blocks.digests[:, len(whole)] >> 4 == int(prefix[-1], 16)
    found = np.flatnonzero(mask)
    return [int(b) for b in found[np.argsort(blocks.state[found] != 2, kind="stable")]]


def detail(segment: Segment, block: int) -> Row:
    """All that the segment has about a block."""
    blocks = segment.blocks
    free = segment.free("blocks")
    below = np.flatnonzero((blocks.parent == block) & (blocks.state != 0))
    return {
        "tier": "disk" if segment.is_of_disk else "host",
        **block_row(segment, block),
        "record_is_free": bool(free[block]) if block < len(free) else None,
        "chain": chain(segment, block),
        "children_blocks": [int(b) for b in below[:LISTED_MAX]],
        "index": index_entries(segment, block),
        "operations": _operations(segment, block),
        "slot_headers": slot_headers(segment, block),
    }


def chain(segment: Segment, block: int) -> list[Row]:
    """From a block's parent up to the root; ends where a parent is not the one that was named."""
    blocks = segment.blocks
    found: list[Row] = []
    seen = {block}
    here = block
    while len(found) < LISTED_MAX:
        above = int(blocks.parent[here])
        if above < 0:
            break
        whole = above < len(blocks) and bool(blocks.parent_found[here])
        state = int(blocks.state[above]) if above < len(blocks) else -1
        found.append(
            {
                "block": above,
                "state": contract.BLOCK_STATES.get(state, "unknown"),
                "as_named": whole,
            }
        )
        if not whole or above in seen:
            break
        seen.add(above)
        here = above
    return found


def index_entries(segment: Segment, block: int) -> Row:
    """Where the index would keep this block, and where it does."""
    buckets = segment.buckets
    if len(buckets) == 0 or len(buckets) & (len(buckets) - 1):
        return {"buckets": [], "entries": []}
    digest = segment.blocks.digests.view("<u8")[block]
    tag, first, second = (np.zeros(1, np.uint32) for _ in range(3))
    contract.index_places(
        digest[:1].astype(np.uint64), digest[1:].astype(np.uint64), len(buckets), tag, first, second
    )
    wanted = [int(first[0]), int(second[0])]
    entry = np.uint64(int(tag[0]) << 32 | block + 1)
    entries = [
        {"bucket": bucket, "place": int(place)}
        for bucket in dict.fromkeys(wanted)
        for place in np.flatnonzero(buckets[bucket] == entry)
    ]
    return {"buckets": wanted, "entries": entries}


def _operations(segment: Segment, block: int) -> list[Row]:
    """Operations in use that have a row for this block."""
    records = segment.operations
    count = np.minimum(records["row_count"], contract.ROWS)
    row = np.arange(contract.ROWS) < count[:, None]
    named = ((records["rows"]["block"] == block) & row).any(axis=1)
    named &= part(records["word"], "operation", "state") != 0
    return [operation_row(segment, int(number)) for number in np.flatnonzero(named)]


def slot_headers(segment: Segment, block: int) -> list[dict[str, Any]]:
    """What each rank's arena or slab says about the block's slot."""
    blocks = segment.blocks
    if int(blocks.placement_state[block, 0]) == 0:
        return []
    slot = int(blocks.slot[block, 0])
    found = [
        _slab_header(facts, rank, slot)
        for rank, facts in segment.slabs.items()
        if slot < len(facts.headers)
    ]
    for rank in segment.arenas:
        headers = segment.slot_headers(rank)
        if slot >= len(headers):
            continue
        header = headers[slot]
        word = int(header["word"])
        digest = int(header["digest_lo"]).to_bytes(8, "little")
        digest += int(header["digest_hi"]).to_bytes(8, "little")
        found.append(
            {
                "rank": rank,
                "state": SLOT_STATES.get(word >> 60, "unknown"),
                "generation": word & 0xFFFFFFFF,
                "digest": digest.hex(),
                "checksum": f"{int(header['checksum']):#018x}" if word >> 59 & 1 else None,
                "payload_bytes": int(header["payload_bytes"]),
                "block": int(header["block"]),
            }
        )
    return found


def _slab_header(facts: SlabFacts, rank: int, slot: int) -> Row:
    header = facts.headers[slot]
    digests = {
        name: b"".join(int(header[f"{name}_{half}"]).to_bytes(8, "little") for half in ("lo", "hi"))
        for name in ("digest", "parent")
    }
    return {
        "rank": rank,
        "state": CONDITIONS[int(facts.conditions[slot])],
        "generation": int(header["generation"]),
        "digest": digests["digest"].hex(),
        "parent": digests["parent"].hex(),
        "checksum": f"{int(header['data_checksum']):#018x}",
        "payload_bytes": int(header["payload_bytes"]),
        "written_unix_s": int(header["written_ns"]) / 1e9,
        "block": None,
    }
