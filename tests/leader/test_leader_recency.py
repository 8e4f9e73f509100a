# SPDX-License-Identifier: Apache-2.0
"""What the leader keeps when its tier is small: the hits are those of exact LRU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvbm._fast.keys import Keys
from kvbm.replay.manager import replay
from kvbm.replay.policies import lru_hits
from kvbm.replay.trace import Request, read
from tests.engines import MakeEngine
from tests.fast.instances import digests
from tests.small_engine import SmallEngine

REQUESTS = 120
SLOTS = 48


def talks(seed: int) -> list[Request]:
    """Conversations with answers; some questions are asked again and get the same answer."""
    rng = random.Random(seed)
    histories: list[list[int]] = [[] for _ in range(5)]
    asked: list[Request] = []
    block = 1
    for number in range(REQUESTS):
        if asked and rng.random() < 0.3:
            asked.append(rng.choice(asked[-12:]))
            continue
        history = rng.choice(histories)
        if len(history) > 15:
            history.clear()
        count, answer = rng.randint(1, 3), rng.randint(0, 3)
        history += range(block, block + count)
        generated = tuple(range(block + count, block + count + answer))
        asked.append(Request(number, 0, 0, list(history), generated))
        history += generated
        block += count + answer
    return asked


def run(engine: SmallEngine, name: str, request: Request) -> int:
    """Run a request from its start to its end; what was found of its prompt."""
    hashes = [digests(1, block)[0] for block in request.chain]
    prompt = len(request.blocks)
    complete = hashes[:prompt]
    sequence = engine.leader.track(name, [Keys(complete)])
    hits = engine.leader.match(sequence, 0, prompt)
    engine.place(sequence, range(len(hashes)))
    if hits:
        engine.leader.load(sequence, hits)
        engine.run_until(lambda: name in engine.received)
    assert engine.values(range(hits)) == [float(block) for block in request.chain[:hits]]
    written = hits
    for upto in range(prompt, len(hashes) + 1):  # the prompt in one step, each block in another
        complete[:] = hashes[:upto]
        engine.leader.store(sequence, upto)
        for block in range(written, upto):
            engine.caches[0].write(block, float(request.chain[block]))
        written = upto
        engine.step()
    if engine.leader.finish(name, len(hashes)):
        engine.run_until(lambda: name in engine.sent)
    engine.run_until(lambda: not engine.leader.holds_device_blocks)
    return hits


@pytest.mark.parametrize("seed", range(2))
def test_with_a_small_tier_the_hits_are_those_of_exact_lru_and_of_the_replay_of_the_record(
    make_engine: MakeEngine, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "record.jsonl"
    engine = make_engine(SLOTS, enable_record=True, record_path=path)
    hits = sum(run(engine, str(n), request) for n, request in enumerate(talks(seed)))
    assert engine.counter("evicted") > 0
    assert engine.counter("deduplicated") > 0
    engine.close()
    trace = read(path)
    assert len(trace.requests) == REQUESTS
    assert hits == lru_hits(trace, SLOTS) == replay(trace, SLOTS).hits
