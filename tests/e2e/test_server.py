# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with kvbm over HTTP: many clients at once, clients that go away, the cache reset."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from bench.vllm_lab.processes import existing_names
from bench.vllm_lab.results import RequestResult
from kvbm.controller import BlockManagerClient, BlockPoolStatus
from kvbm.instance import instances, segment_name
from tests.e2e.lab import LAST_TURN, TRAFFIC, Lab
from tests.e2e.server import Completion, Server
from tests.leaks import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LEAVE_AFTER = (1, 2, 5, 9)  # tokens
IDLE_S = 30.0


@dataclass
class Lived:
    """What was seen while the server ran, and at its end."""

    completions: dict[str, list[Completion]] = field(default_factory=dict)
    pool: dict[str, BlockPoolStatus] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    was_idle: bool = False
    exit_status: int | None = None
    names: tuple[str, ...] = ()
    names_left: list[str] = field(default_factory=list)


def together(server: Server, requests: Sequence[RequestResult]) -> list[Completion]:
    """Send requests at once, each from a client of its own."""
    with ThreadPoolExecutor(len(requests)) as clients:
        return list(clients.map(lambda r: server.complete(r.prompt, len(r.output)), requests))


def half_go_away(server: Server, requests: Sequence[RequestResult]) -> list[Completion]:
    """Send requests at once; every other client goes away in the middle of its stream."""

    def client(number: int) -> Completion:
        request = requests[number]
        leaves = LEAVE_AFTER[number // 2 % len(LEAVE_AFTER)] if number % 2 else None
        return server.complete(request.prompt, len(request.output), leaves)

    with ThreadPoolExecutor(len(requests)) as clients:
        return list(clients.map(client, range(len(requests))))


def reset(server: Server) -> bool:
    """Empty all caches; False while blocks of the device are held."""
    answer = json.loads(server.post("/reset_prefix_cache?reset_external=true"))
    return bool(answer["success"])


def live(server: Server, turns: list[tuple[RequestResult, ...]]) -> Lived:
    """Do all of it."""
    lived = Lived(names=server.mapped_names())
    (instance,) = [name for name in instances() if segment_name(name)[1:] in lived.names]
    controller = BlockManagerClient(instance)
    last = turns[-1]
    lived.completions["chat"] = [c for turn in turns for c in together(server, turn)]
    lived.completions["again"] = together(server, last)
    lived.completions["left"] = half_go_away(server, last)
    lived.pool["full"] = controller.status("G2")
    lived.metrics["full"] = server.metrics()
    lived.was_idle = wait_until(lambda: reset(server), IDLE_S)
    lived.pool["reset"] = controller.status("G2")
    lived.completions["after reset"] = [server.complete(last[0].prompt, len(last[0].output))]
    lived.completions["refill"] = together(server, last)
    lived.completions["from cache"] = together(server, last)
    lived.exit_status = server.stop(signal.SIGTERM)
    lived.names_left = existing_names(lived.names)
    return lived


@pytest.fixture(scope="module")
def turns(lab: Lab) -> list[tuple[RequestResult, ...]]:
    """The traffic with the outputs of an engine without kvbm."""
    return [lab.reference().of_turns(turn).requests for turn in range(TRAFFIC.turns)]


@pytest.fixture(scope="module")
def lived(lab: Lab, turns: list[tuple[RequestResult, ...]]) -> Lived:
    """One server in which all of it happens; at its end vLLM kills the engine core, its default."""
    with Server(lab.with_kvbm(worker_processes=True), lab.new_log(), 0) as server:
        return live(server, turns)


def assert_same(requests: Sequence[RequestResult], completions: Sequence[Completion]) -> None:
    """Fail unless each client has received what is expected, as far as it stayed."""
    assert len(requests) == len(completions) > 0
    for request, completion in zip(requests, completions, strict=True):
        if completion.finish_reason is None:
            assert completion.tokens == request.output[: len(completion.tokens)] != ()
        else:
            assert (completion.tokens, completion.finish_reason) == (request.output, "length")


def cached(completions: Sequence[Completion]) -> int:
    """Prompt tokens that were not computed."""
    return sum(completion.cached_tokens for completion in completions)


def test_concurrent_clients_get_the_outputs_of_an_engine_without_kvbm(
    turns: list[tuple[RequestResult, ...]], lived: Lived
) -> None:
    assert_same([request for turn in turns for request in turn], lived.completions["chat"])
    assert_same(turns[LAST_TURN], lived.completions["again"])
    assert cached(lived.completions["again"]) > 0


def test_clients_that_go_away_disturb_nobody(
    turns: list[tuple[RequestResult, ...]], lived: Lived
) -> None:
    assert_same(turns[LAST_TURN], lived.completions["left"])
    gone = [completion.finish_reason is None for completion in lived.completions["left"]]
    assert gone == [False, True] * (len(gone) // 2)


def test_no_block_is_held_when_all_clients_are_gone(lived: Lived) -> None:
    assert lived.was_idle
    assert lived.pool["reset"].active == 0


def test_reset_empties_the_cache(lived: Lived) -> None:
    assert lived.pool["full"].inactive > 0
    assert (lived.pool["reset"].inactive, lived.pool["reset"].active) == (0, 0)
    assert cached(lived.completions["after reset"]) == 0


def test_the_cache_works_after_the_reset(
    turns: list[tuple[RequestResult, ...]], lived: Lived
) -> None:
    last = turns[LAST_TURN]
    assert_same(last[:1], lived.completions["after reset"])
    for name in ("refill", "from cache"):
        assert_same(last, lived.completions[name])
    assert cached(lived.completions["from cache"]) > cached(lived.completions["refill"]) > 0


def test_vllms_metrics_have_ours(lived: Lived) -> None:
    metrics = lived.metrics["full"]
    for name in ("matched_tokens", "offload_blocks_d2h", "onboard_blocks_h2d", "lookup_blocks"):
        assert metrics[f"kvbm_{name}_total"] > 0, name
    assert metrics["kvbm_errors_total"] == 0


def test_the_server_leaves_nothing_though_it_kills_its_engine_core(lived: Lived) -> None:
    assert lived.exit_status == 0
    assert any(name.endswith(".host.0") for name in lived.names)
    assert lived.names_left == []
