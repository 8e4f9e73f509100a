# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with kvbm over HTTP: many clients at once, clients that go away, the cache reset."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from bench.vllm_lab.processes import existing_names
from bench.vllm_lab.results import RequestResult
from kvbm.controller import BlockManagerClient, BlockPoolStatus
from kvbm.instance import instances, segment_name
from tests.e2e.counted import BLOCK, BLOCK_BYTES, Scraped, Traffic, scrape_settled, traffic_of
from tests.e2e.lab import LAST_TURN, TRAFFIC, Lab
from tests.e2e.server import Completion, Server
from tests.leaks import wait_until
from tests.metrics.scrape import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CLIENTS = 3  # at once; they find room on the device, while all of TRAFFIC's do not
DEVICE_BLOCKS = 80
LEAVE_AFTER = (1, 2, 5, 9)  # tokens
IDLE_S = 30.0


@dataclass
class Lived:
    """What was seen while the server ran, and at its end."""

    completions: dict[str, list[Completion]] = field(default_factory=dict)
    pool: dict[str, BlockPoolStatus] = field(default_factory=dict)
    metrics: dict[str, Scraped] = field(default_factory=dict)
    counted: dict[str, Traffic] = field(default_factory=dict)
    seconds: float = 0.0  # until the last metrics were read
    was_idle: bool = False
    exit_status: int | None = None
    names: tuple[str, ...] = ()
    names_left: list[str] = field(default_factory=list)


def together(
    server: Server, requests: Sequence[RequestResult], clients: int | None = None
) -> list[Completion]:
    """Send requests at once, each from a client of its own, or from so many clients."""
    with ThreadPoolExecutor(clients or len(requests)) as pool:
        return list(pool.map(lambda r: server.complete(r.prompt, len(r.output)), requests))


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


def read_settled(
    server: Server, port: int, sent: Sequence[RequestResult], received: Sequence[Completion]
) -> tuple[Scraped, Traffic]:
    """The metrics, and what all clients so far have counted."""
    return scrape_settled(server, port), traffic_of(sent, received)


def live(server: Server, port: int, turns: list[tuple[RequestResult, ...]]) -> Lived:
    """Do all of it; kvbm's metrics are at the port."""
    lived = Lived(names=server.mapped_names())
    (instance,) = [name for name in instances() if segment_name(name)[1:] in lived.names]
    controller = BlockManagerClient(instance)
    last = turns[-1]
    began = time.monotonic()
    lived.completions["chat"] = [c for turn in turns for c in together(server, turn, CLIENTS)]
    sent, received = [r for turn in turns for r in turn], [*lived.completions["chat"]]
    lived.metrics["roomy"], lived.counted["roomy"] = read_settled(server, port, sent, received)
    lived.completions["again"] = together(server, last)
    sent, received = [*sent, *last], received + lived.completions["again"]
    lived.metrics["crowded"], lived.counted["crowded"] = read_settled(server, port, sent, received)
    lived.seconds = time.monotonic() - began
    lived.completions["left"] = half_go_away(server, last)
    lived.pool["full"] = controller.status("G2")
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
    port = free_port()
    environment = {"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_PORT": str(port)}
    settings = lab.with_kvbm(environment, worker_processes=True, device_blocks=DEVICE_BLOCKS)
    assert CLIENTS * (-(-TRAFFIC.longest_tokens() // BLOCK) + 1) < DEVICE_BLOCKS
    with Server(settings, lab.new_log(), 0) as server:
        return live(server, port, turns)


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


@pytest.fixture(params=["roomy", "crowded"])
def moment(request: pytest.FixtureRequest) -> str:
    """When the metrics were read: with few clients at once, and with many."""
    return str(request.param)


def test_the_clients_and_vllm_count_the_same(moment: str, lived: Lived) -> None:
    vllm, counted = lived.metrics[moment].vllm, lived.counted[moment]
    assert vllm["vllm:request_success_total"] == counted.requests
    assert vllm["vllm:prompt_tokens_total"] == counted.prompt_tokens
    assert vllm["vllm:generation_tokens_total"] == counted.output_tokens
    hits = [vllm[f"vllm:{which}prefix_cache_hits_total"] for which in ("", "external_")]
    assert min(hits) > 0
    if moment == "roomy":  # vLLM shows no hits of requests that were preempted
        assert vllm["vllm:num_preemptions_total"] == 0
        assert sum(hits) == counted.cached_tokens


def test_what_was_matched_and_loaded_is_what_vllm_was_given(moment: str, lived: Lived) -> None:
    found, loads = lived.metrics[moment], {"source": "host", "target": "device"}
    given = found.vllm["vllm:external_prefix_cache_hits_total"]
    tokens = found.total("kvbm_matched_tokens")
    assert tokens == given if moment == "roomy" else tokens >= given
    assert tokens == found.total("kvbm_tokens_matched_total")
    assert tokens == found.total("kvbm_onboard_blocks_h2d") * BLOCK
    assert tokens == found.total("kvbm_transferred_blocks_total", **loads) * BLOCK
    assert tokens * BLOCK_BYTES == found.total("kvbm_transferred_bytes_total", **loads) * BLOCK


def test_each_block_that_was_computed_is_stored_once(moment: str, lived: Lived) -> None:
    found, counted = lived.metrics[moment], lived.counted[moment]
    stores = {"source": "device", "target": "host"}
    blocks = found.total("kvbm_transferred_blocks_total", **stores)
    assert blocks == counted.distinct_blocks == found.total("kvbm_offload_blocks_d2h")
    assert found.total("kvbm_transferred_bytes_total", **stores) == blocks * BLOCK_BYTES
    assert found.total("kvbm_blocks_published_total") == blocks
    assert found.total("kvbm_blocks", state="registered") == blocks  # nothing was evicted
    assert found.total("kvbm_slots", state="used") == blocks


def test_hit_rates_are_those_of_what_was_asked_for(lived: Lived) -> None:
    found, counted = lived.metrics["roomy"], lived.counted["roomy"]
    on_device = found.vllm["vllm:prefix_cache_hits_total"] / BLOCK
    asked = counted.asked_blocks - on_device
    loaded = found.total("kvbm_onboard_blocks_h2d")
    assert found.total("kvbm_host_cache_hit_rate") == pytest.approx(loaded / asked)
    assert found.total("kvbm_disk_cache_hit_rate") == 0
    # A request that waits, for device blocks or for what is being stored, is looked up again.
    assert found.total("kvbm_lookups_total") < 1.5 * counted.requests
    looked_up = found.total("kvbm_blocks_looked_up_total")
    matched = found.total("kvbm_blocks_matched_total")
    assert looked_up >= asked
    assert loaded <= matched <= looked_up
    assert found.vllm["vllm:external_prefix_cache_queries_total"] >= asked * BLOCK


def test_each_transfer_is_in_the_histograms_and_none_has_failed(moment: str, lived: Lived) -> None:
    found = lived.metrics[moment]
    for source, target in (("device", "host"), ("host", "device")):
        way = {"source": source, "target": target}
        done = found.total("kvbm_transfers_total", result="done", **way)
        assert done > 0
        for name in ("latency", "copy"):
            assert found.total(f"kvbm_transfer_{name}_seconds_count", **way) == done
        seconds = found.total("kvbm_transfer_seconds_total", **way)
        assert found.total("kvbm_transfer_copy_seconds_sum", **way) == pytest.approx(seconds)
        assert 0 < seconds <= found.total("kvbm_transfer_latency_seconds_sum", **way)
    assert found.total("kvbm_transfers_total", result="failed") == 0
    if moment == "roomy":  # preemptions cancel stores
        assert found.total("kvbm_transfers_total", result="cancelled") == 0
    for name in ("errors", "check_failures", "recoveries", "stores_skipped", "blocks_evicted"):
        assert found.total(f"kvbm_{name}_total") == 0, name


def test_the_cpu_time_of_calls_and_copies_is_part_of_the_time_that_passed(lived: Lived) -> None:
    found = lived.metrics["crowded"]
    calls, copies = (found.total("kvbm_cpu_seconds_total", rank=rank) for rank in ("", "0"))
    assert 0 < calls < lived.seconds
    assert 0 < copies < lived.seconds


def test_vllms_metrics_have_ours(moment: str, lived: Lived) -> None:
    found = lived.metrics[moment]
    device, host = {"source": "device", "target": "host"}, {"source": "host", "target": "device"}
    for name, number in {
        "matched_tokens": found.total("kvbm_tokens_matched_total"),
        "lookup_blocks": found.total("kvbm_blocks_looked_up_total"),
        "matched_blocks": found.total("kvbm_blocks_matched_total"),
        "offload_blocks_d2h": found.total("kvbm_transferred_blocks_total", **device),
        "onboard_blocks_h2d": found.total("kvbm_transferred_blocks_total", **host),
        "offload_bytes": found.total("kvbm_transferred_bytes_total", **device),
        "onboard_bytes": found.total("kvbm_transferred_bytes_total", **host),
        "offload_seconds": found.total("kvbm_transfer_seconds_total", **device),
        "onboard_seconds": found.total("kvbm_transfer_seconds_total", **host),
    }.items():
        assert found.vllm[f"kvbm_{name}_total"] == pytest.approx(number) != 0, name
    assert found.vllm["kvbm_errors_total"] == 0


def test_the_server_leaves_nothing_though_it_kills_its_engine_core(lived: Lived) -> None:
    assert lived.exit_status == 0
    assert any(name.endswith(".host.0") for name in lived.names)
    assert lived.names_left == []
