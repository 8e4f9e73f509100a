# SPDX-License-Identifier: Apache-2.0
"""Engines with a host tier smaller than the traffic and a disk behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.vllm_lab.settings import EngineSettings
from bench.vllm_lab.workload import Send
from kvbm._fast.segment import Segment
from kvbm.tiers.disk import read_slab
from tests.e2e.lab import LAST_TURN, Lab
from tests.e2e.lives import Driver
from tests.leaks import wait_until

HOST_BLOCKS = 48  # two requests' at least; the device has 64, the traffic some hundreds
DISK_BLOCKS = 600
SETTLE_S = 60.0


def with_disk(lab: Lab, folder: Path, **environment: str) -> EngineSettings:
    """An engine that writes every block to disk."""
    return lab.with_kvbm(
        {
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(HOST_BLOCKS),
            "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": str(DISK_BLOCKS),
            "DYN_KVBM_DISK_CACHE_DIR": str(folder),
            "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "1",
        }
        | environment
    )


def disk_counters(instance: str) -> dict[str, int]:
    """Counters of an instance's disk tier."""
    segment = Segment.attach(f"/kvbm-{instance}.disk", writable=False)
    try:
        return segment.counters()
    finally:
        segment.close()


def last_turn(lab: Lab, name: str = "last turn", first: int = 0, end: int | None = None) -> Send:
    """The prompts of the last turn, or some of them, one after the other."""
    requests = lab.reference().of_turns(LAST_TURN).requests
    return Send(name, lab.last_prompts()[first:end], len(requests[0].output), 1)


def damage(path: Path, every: int = 1) -> int:
    """Overwrite some bytes of each so manieth block of a slab; returns how many have been."""
    found = read_slab(path)
    assert found is not None
    layout, slots = found[0].layout, found[1]["slot"][::every]
    with open(path, "r+b") as file:
        for slot in slots:
            file.seek(layout.data_offset + int(slot) * layout.stride + layout.payload_bytes // 2)
            file.write(b"damaged")
    return len(slots)


# ---- in the engine's process ---------------------------------------------------------------------
def damage_all(_: Any, path: Path) -> int:
    """`damage` each block, while the engine has the slab open."""
    return damage(path)


def counters_of(_: Any, instance: str) -> dict[str, int]:
    """`disk_counters` in the middle of a run."""
    return disk_counters(instance)


def settle(leader: Any) -> None:
    """Wait until all that was offered to the disk is written; an idle engine makes no steps."""

    def settled() -> bool:
        leader.collect()
        tier = leader.disk
        return not (leader._storing or tier._candidates or tier._spills or tier._fetches)

    assert wait_until(settled, SETTLE_S)


def pace(llm: Any) -> None:
    """From now on nothing depends on how fast the disk is.

    What requests have stored is on disk before the next ones come, and what is on disk is read.
    """
    leader = Driver(llm).side.leader
    assert wait_until(lambda: leader.disk.disk is not None, SETTLE_S)
    leader.disk.prefill.step = lambda tokens: None  # no rate to compare with
    generate = llm.generate

    def paced(*arguments: Any, **options: Any) -> Any:
        outputs = generate(*arguments, **options)
        settle(leader)
        return outputs

    llm.generate = paced


def what_is_held(llm: Any) -> dict[str, int]:
    """What the engine and the cache hold once all is done, and what NIXL has moved until then."""
    driver = Driver(llm)
    facts: dict[str, int] = dict(driver.end().facts)
    tier = driver.side.leader.disk
    settle(driver.side.leader)
    facts["held on disk"] = sum(tier.disk.held().values()) - len(tier._quarantined)
    if facts["could hold"]:  # else the worker is in another process
        facts["moved by NIXL"] = sum(mover.blocks for mover in driver.worker._disk._movers)
    return facts
