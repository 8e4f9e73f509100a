# SPDX-License-Identifier: Apache-2.0
"""A trace of conversations made from a seed.

A few applications, each with a system prompt of its own; conversations arrive at random, and each
goes on with some probability after a pause, repeating all that was said. That is where prefix
caches earn: the pauses are long, so what else arrives meanwhile decides what is still there.
"""

from __future__ import annotations

import heapq
import random
from itertools import count

from kvbm.replay.trace import BLOCK_TOKENS, Request, Trace

APPLICATIONS = 4
SYSTEM_BLOCKS = (1, 12)
TURN_BLOCKS = (1, 20)
CONTINUES = 0.6
PAUSE_S = 90.0
ARRIVAL_S = 0.5


def conversations(requests: int, seed: int, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Make a trace.

    Parameters
    ----------
    requests : int
        Number of requests.
    seed : int
        Equal seeds give equal traces.
    block_tokens : int
        Tokens of a block.
    """
    rng = random.Random(seed)
    fresh = count()
    systems = [
        [next(fresh) for _ in range(rng.randint(*SYSTEM_BLOCKS))] for _ in range(APPLICATIONS)
    ]
    # Of each turn: when it is asked, a number that makes entries distinct, what was said before.
    waiting: list[tuple[float, int, list[int]]] = []
    numbers = count()
    arrival = 0.0
    made: list[Request] = []
    while len(made) < requests:
        if not waiting or arrival < waiting[0][0]:
            heapq.heappush(waiting, (arrival, next(numbers), rng.choice(systems)))
            arrival += rng.expovariate(1 / ARRIVAL_S)
            continue
        now, _, said = heapq.heappop(waiting)
        blocks = said + [next(fresh) for _ in range(rng.randint(*TURN_BLOCKS))]
        output = rng.randint(1, 2 * block_tokens)
        made.append(Request(int(1000 * now), len(blocks) * block_tokens, output, blocks))
        if rng.random() < CONTINUES:
            heapq.heappush(waiting, (now + rng.expovariate(1 / PAUSE_S), next(numbers), blocks))
    return Trace(f"conversations of seed {seed}", made, block_tokens)
