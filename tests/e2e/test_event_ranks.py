# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel engines of real vLLM, each with a stream of events of its own.

Not a part of `make test`: with two engine cores, two workers and a coordinator, each of which
imports vLLM, the server takes a minute and a half to start on two cores.

The routers are processes and are killed with SIGKILL at random while both engines work. What they
know at the end is compared with two sources that the consolidator's code has no part in: what
vLLM's own replay, read by vLLM's own decoder, says of the device, and the block tables.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

zmq = pytest.importorskip("zmq")
msgspec = pytest.importorskip("msgspec")

from kvbm._fast.changes import TableWatch  # noqa: E402
from kvbm._fast.segment import Segment  # noqa: E402
from kvbm.events.model import MASK64, Tier  # noqa: E402
from kvbm.instance import private_instance, segment_name  # noqa: E402
from tests.e2e.lab import Lab  # noqa: E402
from tests.e2e.router import Router  # noqa: E402
from tests.e2e.server import HOST, Server  # noqa: E402
from tests.events.sockets import free_base_port  # noqa: E402
from tests.leaks import wait_until  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.stress, pytest.mark.timeout(600)]

RANKS = 2
HOST_BLOCKS = 96
PROMPTS = 24
PROMPT_TOKENS = 250  # of blocks of 32; all prompts of a rank are more than the host tier holds
HANDFUL = 4
SETTLE_S = 60.0
OUTPUT, REPLAY, ENGINE, ENGINE_REPLAY = 1000, 2000, 3000, 4000  # ports above the base


@dataclass
class Lived:
    """What was seen: by rank."""

    knows: list[dict[str, Any]] = field(default_factory=list)
    truth: list[dict[int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    resumed: int = 0
    ranks_of_vllm: list[set[int]] = field(default_factory=list)


class Engine:
    """What one rank really has."""

    def __init__(self, rank: int, port: int, instance: str) -> None:
        self.rank = rank
        self.replay = f"tcp://{HOST}:{port + ENGINE_REPLAY + rank}"
        self.instance = instance
        self.said_rank: set[int] = set()

    def device(self) -> set[int]:
        """Blocks of its device cache, from everything that vLLM has published."""
        from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

        copies: Counter[int] = Counter()
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        for number, payload in enumerate(self._published()):
            batch = decoder.decode(payload[1])
            assert payload[0] == number
            self.said_rank.add(batch.data_parallel_rank)
            for event in batch.events:
                change = {BlockStored: 1, BlockRemoved: -1}[type(event)]
                for value in event.block_hashes:
                    copies[value & MASK64] += change
        return {value for value, count in copies.items() if count > 0}

    def _published(self) -> list[tuple[int, bytes]]:
        """Number and payload of each message since the start, by vLLM's replay."""
        found = []
        with closing(zmq.Context.instance().socket(zmq.DEALER)) as asker:
            asker.linger = 0
            asker.rcvtimeo = int(SETTLE_S * 1000)
            asker.connect(self.replay)
            asker.send_multipart([b"", (0).to_bytes(8, "big")])
            while True:
                *_, number, payload = asker.recv_multipart()
                if not payload:
                    return found
                found.append((int.from_bytes(number, "big"), payload))

    def host(self) -> set[int]:
        """Blocks of its host tier, from the table."""
        with closing(Segment.attach(segment_name(self.instance), writable=False)) as segment:
            return {value for value, _ in TableWatch(segment).delta().added}

    def truth(self) -> dict[int, int]:
        """Each block with its tiers."""
        found = dict.fromkeys(self.device(), int(Tier.DEVICE))
        for value in self.host():
            found[value] = found.get(value, 0) | Tier.HOST
        return found


def traffic(dice: random.Random) -> list[tuple[int, list[int]]]:
    """Rank and prompt of each request: half of the prompt is that of an earlier one."""
    requests: list[tuple[int, list[int]]] = []
    for rank in range(RANKS):
        prompts: list[list[int]] = []
        for _ in range(PROMPTS):
            start = dice.choice(prompts)[: PROMPT_TOKENS // 2] if prompts else []
            rest = PROMPT_TOKENS - len(start)
            prompts.append(start + [dice.randint(3, 2000) for _ in range(rest)])
        requests += [(rank, prompt) for prompt in prompts]
    dice.shuffle(requests)
    return requests


def live(server: Server, engines: Sequence[Engine], routers: Sequence[Router]) -> Lived:
    """Traffic and kills, and then what the routers have come to know.

    A router is killed while a handful of requests runs, and started again with or without what it
    had saved.
    """
    lived, dice = Lived(), random.Random(2)
    requests = traffic(random.Random(1))
    with ThreadPoolExecutor(HANDFUL) as clients:
        for first in range(0, len(requests), HANDFUL):
            running = [
                clients.submit(server.complete, prompt, 4, rank=rank)
                for rank, prompt in requests[first : first + HANDFUL]
            ]
            router = routers[first // HANDFUL % RANKS]
            wait(running, timeout=dice.uniform(0.0, 0.3))
            router.restart(remembers=dice.random() < 0.5)
            lived.resumed += router.knows()["resumed"]
            assert {done.result().finish_reason for done in running} == {"length"}
    for engine, router in zip(engines, routers, strict=True):
        server.complete([5], 1, rank=engine.rank)  # vLLM publishes at the end of a step
        wait_until(lambda e=engine, r=router: r.knows()["blocks"] == e.truth(), SETTLE_S)
        lived.knows.append(router.knows())
        lived.truth.append(engine.truth())
        lived.starts.append(router.starts)
        lived.ranks_of_vllm.append(engine.said_rank)
    return lived


@pytest.fixture(scope="module")
def lived(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """One server with two engines in which all of it happens."""
    folder: Path = tmp_path_factory.mktemp("routers")
    port = free_base_port(RANKS, (OUTPUT, REPLAY, ENGINE, ENGINE_REPLAY))
    name = f"ranks-{uuid.uuid4()}"
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port + ENGINE}",
        "replay_endpoint": f"tcp://*:{port + ENGINE_REPLAY}",
    }
    variables = {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(HOST_BLOCKS),
        "DYN_KVBM_LEADER_ZMQ_PUB_PORT": str(port),
        "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE": "passthrough",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the lab binds one engine
    }
    arguments = {
        "data_parallel_size": RANKS,
        "api_server_count": 1,
        "kv_events_config": events,
    }
    settings = lab.with_kvbm(variables, worker_processes=True, extra_arguments=arguments)
    config = {**(settings.kv_transfer_config or {}), "engine_id": name}
    settings = replace(settings, kv_transfer_config=config)
    engines = [
        Engine(rank, port, private_instance(f"{name}_dp{rank}"))  # as vLLM calls its ranks
        for rank in range(RANKS)
    ]
    with Server(settings, lab.new_log()) as server, ExitStack() as stack:
        routers = [
            stack.enter_context(
                Router(
                    f"tcp://{HOST}:{port + OUTPUT + rank}",
                    f"tcp://{HOST}:{port + REPLAY + rank}",
                    folder / f"router-{rank}.json",
                )
            )
            for rank in range(RANKS)
        ]
        found = live(server, engines, routers)
        assert server.stop() == 0
    return found


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_router_that_is_killed_at_random_knows_each_block_with_its_tiers(
    lived: Lived, rank: int
) -> None:
    assert lived.knows[rank]["blocks"] == lived.truth[rank]
    assert {Tier.HOST, Tier.DEVICE | Tier.HOST} <= set(lived.truth[rank].values())
    assert lived.knows[rank]["lost"] == 0
    known = {None, *lived.knows[rank]["blocks"]}
    assert set(lived.knows[rank]["parents"].values()) <= known


@pytest.mark.parametrize("rank", range(RANKS))
def test_each_rank_tells_of_its_own_blocks_under_its_number(lived: Lived, rank: int) -> None:
    assert lived.ranks_of_vllm[rank] == {rank}
    assert lived.knows[rank]["ranks"] == [rank]
    assert not lived.truth[rank].keys() & lived.truth[1 - rank].keys()


def test_routers_were_killed_and_some_went_on_from_their_number(lived: Lived) -> None:
    assert min(lived.starts) > 3
    assert lived.resumed > 0
