# SPDX-License-Identifier: Apache-2.0
"""What a real engine with a small tier hits, beside LRU and the replay of its own record.

::

    python -m bench.recorded --slots 96,140,200 --together 1,4

Conversations through vLLM's CPU build, whose own prefix cache is off so that all hits are the
tier's. Some questions are asked again later. One request at a time, all three are the same number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.vllm_lab.engine import run_engine, stop_server
from bench.vllm_lab.model import ModelShape, make_model
from bench.vllm_lab.settings import KVBM_TRANSFER_CONFIG, EngineSettings
from bench.vllm_lab.workload import Chat, Conversations, Phase, Replay
from kvbm.replay import trace as traces
from kvbm.replay.command import capacities
from kvbm.replay.manager import replay
from kvbm.replay.policies import lru_hits


class Found(NamedTuple):
    """Hits on one record, in blocks.

    Attributes
    ----------
    requests, asked, recorded : int
        Requests; blocks that the engine asked about, and those that it found.
    references, lru, replayed : int
        Complete blocks of the prompts, and those that exact LRU and the replay find of them.
    """

    requests: int
    asked: int
    recorded: int
    references: int
    lru: int
    replayed: int


def recorded_hits(lines: Iterable[str]) -> tuple[int, int]:
    """Blocks that each request asked about at last, and those of them that were there."""
    last: dict[str, tuple[int, int]] = {}
    for line in lines:
        entry = json.loads(line)
        if entry["event"] == "match":
            last[entry["request"]] = entry["stop"] - entry["start"], entry["hits"]
    return sum(asked for asked, _ in last.values()), sum(hits for _, hits in last.values())


def found_in(path: Path, slots: int) -> Found:
    """Read a record of an engine whose tier has so many blocks."""
    trace = traces.read(path)
    with path.open(encoding="utf-8") as lines:
        asked, recorded = recorded_hits(lines)
    return Found(
        len(trace.requests),
        asked,
        recorded,
        trace.references,
        lru_hits(trace, slots),
        replay(trace, slots).hits,
    )


def traffic(conversations: int, together: int) -> tuple[Phase, ...]:
    """Conversations, then their turns again in three orders."""
    chat = Conversations(conversations, turns=4, output_tokens=70, together=together)
    return (
        Chat("chat", chat),
        Replay("last turns", "chat", (3,), together=together),
        Replay("turns in the middle", "chat", (2, 1), together=together),
        Replay("backwards", "chat", (3, 2, 3), latest_first=True, together=together),
    )


def measure(folder: Path, slots: int, conversations: int, together: int) -> Found:
    """Run an engine with a tier of so many blocks, and read its record."""
    record = folder / f"record-{slots}-{conversations}-{together}.jsonl"
    settings = EngineSettings(
        model=make_model(folder / "models", ModelShape()),
        prefix_caching=False,
        device_blocks=128,
        logprobs=False,
        kv_transfer_config=dict(KVBM_TRANSFER_CONFIG),
        environment={
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(slots),
            "DYN_KVBM_ENABLE_RECORD": "1",
            "DYN_KVBM_RECORD_PATH": str(record),
        },
    )
    run_engine(settings, traffic(conversations, together), folder / "engine.log")
    return found_in(record, slots)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.recorded", description=__doc__)
    parser.add_argument("--slots", type=capacities, default=[96, 140, 200])
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--together", type=capacities, default=[1, 4])
    arguments = parser.parse_args(argv)
    print("| host blocks | together | requests | blocks asked for | engine | LRU | replay |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for together in arguments.together:
            for slots in arguments.slots:
                found = measure(Path(folder), slots, arguments.conversations, together)
                print(
                    f"| {slots} | {together} | {found.requests} | {found.asked:,} | "
                    f"{found.recorded} | {found.lru} | {found.replayed} |",
                    flush=True,
                )
    stop_server()


if __name__ == "__main__":
    main()
