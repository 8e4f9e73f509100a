# SPDX-License-Identifier: Apache-2.0
"""What the commands show, as plain data: the same for people and for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract
from kvbm.inspect.decode import Mask, Segment, name_of
from kvbm.inspect.latency import latency_rows
from kvbm.inspect.records import part
from kvbm.tiers.disk_device import DiskDevice

SCHEMA = 1
"""Moves when a field of `--json` changes its meaning or goes; new fields may come without."""

Row = dict[str, Any]


def leaders_in(holders: int) -> list[int]:
    """Leaders whose bit is set."""
    return [leader for leader in range(contract.LEADERS) if holders >> leader & 1]


# ---- summary -------------------------------------------------------------------------------------
def state_of(segment: Segment) -> str:
    """In a word: in use, idle, dead (somebody died in it), unknown (a plain copy), damaged.

    Or on disk: slabs that no segment is about.
    """
    if segment.capture.kind == "slab" and segment.slabs:
        if any(facts.superblock is None for facts in segment.slabs.values()):
            return "damaged"
        return "in use" if any(f.head.in_use for f in segment.slabs.values()) else "on disk"
    if segment.shape is None or int(segment.header["magic"]) != contract.MAGIC:
        return "damaged"
    if segment.capture.locked is None:
        return "unknown"
    used = np.flatnonzero(segment.participants["role"])
    if any(segment.is_alive(int(line)) for line in used):
        return "in use"
    if len(used):
        return "dead"
    return "in use" if segment.capture.in_use else "idle"


def pools(segment: Segment) -> dict[str, Row]:
    """Fill of the block records and of each tier."""
    found = {pool: _fill(segment, pool) for pool in segment.pools}
    if segment.disk is not None:
        found["disk"] = _fill(segment.disk, "disk")
    elif segment.capacity("disk") and not segment.is_of_disk:  # it is configured, not open yet
        found["disk"] = _fill(segment, "disk")
    return found


def _fill(segment: Segment, pool: str) -> Row:
    total, free = segment.capacity(pool), int(segment.free(pool).sum())
    return {"total": total, "free": free, "used": total - free}


def block_states(segment: Segment) -> dict[str, int]:
    """Blocks by state, and how many of the registered ones are held."""
    blocks = segment.blocks
    counts = np.bincount(blocks.state, minlength=8)
    found = {name: int(counts[number]) for number, name in contract.BLOCK_STATES.items()}
    unknown = int(counts.sum()) - sum(found.values())
    if unknown:
        found["unknown"] = unknown
    found["held"] = int(((blocks.holders != 0) & blocks.of_state("registered")).sum())
    return found


def operation_states(segment: Segment) -> dict[str, int]:
    """Operations by state; free ones are not counted."""
    counts = np.bincount(part(segment.operations["word"], "operation", "state"), minlength=16)
    found = {name: int(counts[n]) for n, name in contract.OPERATION_STATES.items() if n}
    return {name: count for name, count in found.items() if count}


def summary(segment: Segment) -> Row:
    """All about an instance that fits on a screen."""
    header, shape = segment.header, segment.shape
    lines = list(participant_rows(segment))
    ranks = 0 if shape is None or segment.slabs else shape.ranks
    found: Row = {
        "instance": segment.capture.source,
        "kind": segment.capture.kind,
        "state": state_of(segment),
        "owner": segment.capture.owner or None,
        "age_seconds": segment.seconds_since(int(header["created_ns"])),
        "bytes": len(segment.capture.data),
        "arena_bytes": sum(
            size for name, size in segment.capture.objects.items() if ".host." in name
        ),
        "fingerprint": header["fingerprint"].tobytes().hex(),
        "description": segment.description,
        "nonce": int(header["nonce"]),
        "format": int(header["format_version"]),
        "shape": None if shape is None or segment.slabs else shape._asdict(),
        "key_epoch": int(header["key_epoch"]),
        "tick": int(header["tick"]),
        "recovering": bool(header["recovering"]),
        "recovery_locked": segment.capture.recovery_locked,
        "ready_slots": [int(n) for n in header["ready_slots"][:ranks]],
        "pools": pools(segment),
        "blocks": block_states(segment),
        "operations": operation_states(segment),
        "leaders": sum(line["role"] == "leader" for line in lines),
        "workers": sum(line["role"] == "worker" for line in lines),
        "dead": sum(line["alive"] is False for line in lines),
        "counters": segment.counters(),
        "cpu_seconds": {
            "leaders": float(segment.cpu_seconds()[: contract.LEADERS].sum()),
            "workers": float(segment.cpu_seconds()[contract.LEADERS :].sum()),
        },
        "latencies": latency_rows(segment.array("histograms")),
        "arenas": [
            {
                "rank": rank,
                "bytes_per_block": arena.bytes_per_block if arena else None,
                "device_blocks": arena.device_blocks if arena else None,
                "belongs": None if arena is None else arena.nonce == int(header["nonce"]),
            }
            for rank, arena in segment.arenas.items()
        ],
    }
    found["hit_rate"] = _ratio(found["counters"], "matched_blocks", "lookup_blocks")
    found["disk"] = None if segment.disk is None else disk_summary(segment.disk)
    found["slabs"] = [facts.row() for facts in segment.slabs.values()]
    found["device"] = device_row(segment)
    found["damage"] = list(segment.damage)
    return found


def disk_summary(disk: Segment) -> Row:
    """The disk tier of an instance: its table, what it counted, its slabs."""
    nonces = disk.description.get("slabs")
    return {
        "state": state_of(disk),
        "age_seconds": disk.seconds_since(int(disk.header["created_ns"])),
        "bytes": len(disk.capture.data),
        "key_epoch": int(disk.header["key_epoch"]),
        "recovering": bool(disk.header["recovering"]),
        "pools": pools(disk),
        "blocks": block_states(disk),
        "counters": disk.counters(),
        "slabs": [
            {**facts.row(), "belongs": _belongs(facts.row(), rank, nonces)}
            for rank, facts in disk.slabs.items()
        ],
        "device": device_row(disk),
        "damage": list(disk.damage),
    }


def device_row(segment: Segment) -> Row | None:
    """The device of the slabs, as far as it is known; a snapshot may say anything."""
    device = segment.capture.device
    if not isinstance(device, Mapping):
        return None
    texts = ("name", "model", "problem")
    return {
        name: device[name]
        if isinstance(device.get(name), str if name in texts else (int, float))
        else None
        for name in DiskDevice().row()
    }


def _belongs(slab: Row, rank: int, nonces: Any) -> bool | None:
    """Whether a slab is the one that the tier was made for; None if it cannot be said."""
    if not isinstance(nonces, list) or rank >= len(nonces) or slab["nonce"] is None:
        return None
    return bool(slab["nonce"] == nonces[rank])


def _ratio(counters: dict[str, int], part_name: str, whole: str) -> float | None:
    return counters[part_name] / counters[whole] if counters.get(whole) else None


# ---- participants --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lines:
    """Which participants are wanted; None: all."""

    role: str | None = None
    alive: bool | None = None
    leader: int | None = None


def participant_rows(segment: Segment, wanted: Lines | None = None) -> Iterator[Row]:
    """Lines that are marked as used, or whose lock somebody holds."""
    wanted = wanted or Lines()
    pins = _pins_by_leader(segment)
    cpu = segment.cpu_seconds()
    for line, record in enumerate(segment.participants):
        role, alive = int(record["role"]), segment.is_alive(line)
        if role == 0 and not alive:
            continue
        is_leader = line < contract.LEADERS
        leader = line if is_leader else (line - contract.LEADERS) // contract.RANKS
        row = {
            "line": line,
            "role": "none" if role == 0 else name_of(contract.ROLES, role),
            "leader": leader,
            "rank": None if is_leader else (line - contract.LEADERS) % contract.RANKS,
            "pid": int(record["pid"]),
            "alive": alive,
            "inside": bool(record["inside"]),
            "epoch": int(record["epoch"]),
            "engine": f"{int(record['engine_key']):016x}",
            "age_seconds": segment.seconds_since(int(record["started_ns"])),
            "pins": pins[leader] if is_leader else None,
            "attached": None if is_leader else bool(record["attached"]),
            "step_bound": None if is_leader else int(record["step_bound"]),
            "step_filled": None if is_leader else int(record["step_filled"]),
            "queued": None if is_leader else _queued(segment, line),
            "cpu_seconds": float(cpu[line]) if line < len(cpu) else None,
        }
        if wanted.role not in (None, row["role"]):
            continue
        if wanted.alive is not None and row["alive"] is not wanted.alive:
            continue
        if wanted.leader in (None, leader):
            yield row


def _pins_by_leader(segment: Segment) -> list[int]:
    holders = segment.blocks.holders
    return [int((holders >> leader & 1).sum()) for leader in range(contract.LEADERS)]


def _queued(segment: Segment, line: int) -> int | None:
    """Entries that a worker has not taken from its ring."""
    leader, rank = divmod(line - contract.LEADERS, contract.RANKS)
    if segment.shape is None or rank >= segment.shape.ranks:
        return None
    index = leader * segment.shape.ranks + rank
    if index >= len(segment.rings):
        return None
    ring = segment.rings[index]
    return (int(ring["head"]) - int(ring["tail"])) & 0xFFFFFFFF


# ---- blocks --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Filter:
    """Which blocks are wanted; None: all.

    Attributes
    ----------
    state, tier : str or None
        Name of a state; of a tier in which it has a placement.
    holder, group, parent, position : int or None
        A leader that holds it; its group; the block above it; its depth.
    held : bool or None
        Whether anybody holds it.
    older, younger : float or None
        Seconds since it was registered, at least or at most.
    sort : str
        Name of a column.
    descending : bool
        The largest first.
    """

    state: str | None = None
    tier: str | None = None
    holder: int | None = None
    group: int | None = None
    parent: int | None = None
    position: int | None = None
    held: bool | None = None
    older: float | None = None
    younger: float | None = None
    sort: str = "block"
    descending: bool = False


SORTS = ("block", "age", "tick", "children", "position", "slot", "generation", "uses")


def select_blocks(segment: Segment, wanted: Filter) -> npt.NDArray[np.int64]:
    """Numbers of the blocks that are wanted, in the order that is wanted.

    Without a state, only blocks that are not RESET.
    """
    blocks = segment.blocks
    mask: Mask = blocks.of_state(wanted.state) if wanted.state else ~blocks.of_state("reset")
    for value, column in (
        (wanted.group, blocks.group),
        (wanted.parent, blocks.parent),
        (wanted.position, blocks.position),
    ):
        if value is not None:
            mask &= column == value
    if wanted.holder is not None:
        mask &= (blocks.holders >> wanted.holder & 1) == 1
    if wanted.held is not None:
        mask &= (blocks.holders != 0) == wanted.held
    if wanted.tier is not None:
        for tier, name in segment.tiers.items():
            placed = blocks.placement_state[:, tier] != 0
            mask &= placed if name == wanted.tier else np.bool_(False)
    now = segment.capture.monotonic_ns
    if wanted.older is not None:
        mask &= blocks.registered_ns > 0
        mask &= blocks.registered_ns <= (now or 0) - int(wanted.older * 1e9)
    if wanted.younger is not None:
        mask &= blocks.registered_ns > (now or 0) - int(wanted.younger * 1e9)
    chosen = np.flatnonzero(mask)
    columns = {
        "age": -blocks.registered_ns,
        "tick": blocks.tick,
        "children": blocks.children,
        "position": blocks.position,
        "slot": blocks.slot[:, 0],
        "generation": blocks.generation,
        "uses": blocks.uses,
    }
    if wanted.sort in columns:
        chosen = chosen[np.argsort(columns[wanted.sort][chosen], kind="stable")]
    return chosen[::-1] if wanted.descending else chosen


def block_row(segment: Segment, block: int) -> Row:
    """One block."""
    blocks = segment.blocks
    placements = {}
    for tier, name in segment.tiers.items():
        state = int(blocks.placement_state[block, tier])
        if state:
            placements[name] = {
                "state": name_of(contract.PLACEMENT_STATES, state),
                "slot": int(blocks.slot[block, tier]),
                "generation": int(blocks.placement_generation[block, tier]),
            }
    parent = int(blocks.parent[block])
    return {
        "block": block,
        "state": name_of(contract.BLOCK_STATES, int(blocks.state[block])),
        "generation": int(blocks.generation[block]),
        "digest": blocks.digests[block].tobytes().hex(),
        "holders": leaders_in(int(blocks.holders[block])),
        "children": int(blocks.children[block]),
        "parent": None if parent < 0 else parent,
        "parent_generation": int(blocks.parent_generation[block]),
        "position": int(blocks.position[block]),
        "group": int(blocks.group[block]),
        "priority": int(blocks.priority[block]),
        "tick": int(blocks.tick[block]),
        "age_seconds": segment.age_seconds(int(blocks.registered_ns[block])),
        "uses": int(blocks.uses[block]),
        "sequence_hash": f"{int(blocks.sequence_hash[block]):#018x}",
        "placements": placements,
    }


def block_rows(segment: Segment, chosen: Iterable[int]) -> Iterator[Row]:
    """Blocks, one after the other."""
    for block in chosen:
        yield block_row(segment, int(block))


# ---- operations ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Operations:
    """Which operations are wanted; None: all. Free ones only if asked for."""

    state: str | None = None
    kind: str | None = None
    leader: int | None = None
    rows: bool = False


def operation_rows(segment: Segment, wanted: Operations | None = None) -> Iterator[Row]:
    """Operations in use."""
    wanted = wanted or Operations()
    states = part(segment.operations["word"], "operation", "state")
    in_use = states != 0 if wanted.state != "free" else states == 0
    for number in np.flatnonzero(in_use):
        row = operation_row(segment, int(number), wanted.rows)
        if wanted.state not in (None, row["state"]) or wanted.kind not in (None, row["kind"]):
            continue
        if wanted.leader in (None, row["leader"]):
            yield row


def operation_row(segment: Segment, number: int, with_rows: bool = False) -> Row:
    """One operation; `number` counts through those of all leaders."""
    record = segment.operations[number]
    word = np.asarray(record["word"])
    leader, index = divmod(number, contract.OPERATIONS_PER_LEADER)
    ranks = int(part(word, "operation", "ranks"))
    rank_count = segment.shape.ranks if segment.shape else 0
    count = min(int(record["row_count"]), contract.ROWS)
    row: Row = {
        "leader": leader,
        "operation": index,
        "state": name_of(contract.OPERATION_STATES, int(part(word, "operation", "state"))),
        "kind": name_of(contract.OPERATION_KINDS, int(record["kind"])),
        "generation": int(part(word, "operation", "generation")),
        "finisher": int(part(word, "operation", "finisher")),
        "ranks": [
            name_of(contract.RANK_STATES, ranks >> 2 * rank & 3) for rank in range(rank_count)
        ],
        "row_count": int(record["row_count"]),
        "step": int(record["step"]),
        "group": int(record["group"]),
        "request": f"{int(record['request_key']):016x}",
        "age_seconds": segment.age_seconds(int(record["submitted_ns"])),
        "failed_rows": [
            int(row) - 1 if row else None for row in record["failed_rows"][:rank_count]
        ],
    }
    if with_rows:
        row["rows"] = [
            {name: int(one[name]) for name in ("device_block", "slot", "block", "generation")}
            for one in record["rows"][:count]
        ]
    return row
