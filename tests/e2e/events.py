# SPDX-License-Identifier: Apache-2.0
"""What a `Call` asks of an engine about its KV events; and a router that dies at random."""

from __future__ import annotations

import random
from contextlib import closing
from typing import Any

from kvbm._fast.changes import TableWatch
from kvbm._fast.segment import Segment
from kvbm.events.index import EventIndex
from kvbm.events.model import MASK64, Tier, tiers_in
from kvbm.events.table_keys import EngineKeys
from kvbm.events.table_source import table_sources
from kvbm.events.zmq_consolidator import Consolidator, Endpoints
from kvbm.events.zmq_receiver import BatchReceiver
from kvbm.instance import segment_name
from tests.leaks import wait_until

DEADLINE_S = 30.0


def _leader(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector._leader


def tiers_of_blocks(llm: Any) -> dict[int, int]:
    """Blocks by the engine's hash, with the tiers that hold them: from its pool, from the table."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    found: dict[int, int] = {}
    for block in pool.blocks:
        if block.block_hash is not None:
            value = int.from_bytes(block.block_hash[:-4], "big") & MASK64
            found[value] = found.get(value, 0) | Tier.DEVICE
    with closing(Segment.attach(segment_name(_leader(llm).instance), writable=False)) as segment:
        for value, _ in TableWatch(segment).delta().added:
            found[value] = found.get(value, 0) | Tier.HOST
    return found


def take_a_step(llm: Any) -> None:
    """Run a request of less than a block: vLLM publishes its events at the end of a step."""
    from vllm import SamplingParams, TokensPrompt

    llm.generate(TokensPrompt(prompt_token_ids=[5]), SamplingParams(max_tokens=1), use_tqdm=False)


def settled_tiers(llm: Any) -> dict[int, int]:
    """`tiers_of_blocks` once a consolidator that comes late, with all tiers told, says the same.

    It hears what was before it by vLLM's own replay.
    """
    take_a_step(llm)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    events = scheduler.kv_events_config
    endpoints = Endpoints(
        events.endpoint.replace("*", "127.0.0.1"),
        "tcp://127.0.0.1:*",
        "tcp://127.0.0.1:*",
        events.replay_endpoint,
    )
    late = Consolidator(
        endpoints,
        table_sources(_leader(llm).instance, lambda: False),
        EngineKeys(),
        "passthrough",
    )
    index = EventIndex()
    truth = tiers_of_blocks(llm)

    def told() -> bool:
        for batch in router.receive(0.02):
            index.apply(batch)
        return index.blocks == truth == tiers_of_blocks(llm)

    with closing(late), closing(BatchReceiver(late.endpoint, late.replay_endpoint)) as router:
        settled = wait_until(told, DEADLINE_S)
    assert settled, (index.blocks, truth)
    return truth


def steps_with_a_router(llm: Any, prompts: Any, endpoint: str, replay: str, seed: int) -> Any:
    """Send prompts one by one; a router is killed and started again at random meanwhile.

    Returns
    -------
    dict
        Its index at the end, how often it was started, and whether an event ever told what it knew.
    """
    from vllm import SamplingParams, TokensPrompt

    dice = random.Random(seed)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    router, index, starts = BatchReceiver(endpoint, replay), EventIndex(), 1
    for prompt in prompts:
        llm.generate(TokensPrompt(prompt_token_ids=list(prompt.tokens)), sampling, use_tqdm=False)
        for batch in router.receive(0.06):
            index.apply(batch)
        if dice.random() < 0.5:
            router.close()
            router, starts = BatchReceiver(endpoint, replay), starts + 1
            if dice.random() < 0.5:
                index = EventIndex()  # its memory is gone as well
    take_a_step(llm)
    truth = set(tiers_of_blocks(llm))

    def told() -> bool:
        for batch in router.receive(0.02):
            index.apply(batch)
        return set(index.blocks) == truth == set(tiers_of_blocks(llm))

    with closing(router):
        settled = wait_until(told, DEADLINE_S)
    return {
        "settled": settled,
        "blocks": index.blocks,
        "tiers": {tier for tiers in index.blocks.values() for tier in tiers_in(tiers)},
        "orphans": [p for p in index.parents.values() if p is not None and p not in index.blocks],
        "starts": starts,
        "lost": router.lost,
    }
