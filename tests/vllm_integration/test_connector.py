# SPDX-License-Identifier: Apache-2.0
"""The connector's hooks, called in vLLM's order with vLLM's objects."""

from __future__ import annotations

import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.vllm_integration import compat
from kvbm.vllm_integration.stats import KvbmPromMetrics, KvbmStats

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds

BLOCK = 16
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
WHOLE = 4 * BLOCK
BLOCKS = [1, 2, 3, 4, 5]
OTHERS = [11, 12, 13, 14, 15]


# ---- loads and stores ----------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["sha256", "xxhash"])
def test_a_prompt_that_was_computed_is_loaded(connect: Any, algorithm: str) -> None:
    engine = connect(algorithm)
    assert engine.matched(engine.request("nothing yet", PROMPT)) == 0
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    assert engine.load(engine.request("second", PROMPT), OTHERS) == WHOLE
    assert [engine.value(block) for block in OTHERS] == [10, 11, 12, 13, 0]
    assert engine.missing == set()


def test_the_last_token_is_never_claimed(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    for tokens, expected in ((WHOLE, WHOLE - BLOCK), (WHOLE + 1, WHOLE), (BLOCK, 0), (1, 0)):
        assert engine.matched(engine.request(f"first {tokens}", PROMPT[:tokens])) == expected


def test_only_what_follows_the_devices_own_prefix_is_claimed(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    assert engine.matched(second, 2 * BLOCK) == 2 * BLOCK
    assert engine.matched(second, WHOLE) == 0
    assert engine.matched(second, BLOCK + 1) == 0  # not at a border: nothing is promised
    assert engine.matched(second, BLOCK) == 3 * BLOCK
    engine.allocate(second, [7, 12, 13, 14, 15], 3 * BLOCK)
    engine.run_until(lambda: "second" in engine.received)
    assert [engine.value(block) for block in (7, 12, 13, 14)] == [0, 11, 12, 13]


def test_a_range_that_ends_inside_a_block_is_loaded_with_the_whole_block(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    assert engine.matched(second) == WHOLE
    engine.allocate(second, OTHERS[:3], 2 * BLOCK + 3)  # vLLM took less than was offered
    engine.run_until(lambda: "second" in engine.received)
    assert [engine.value(block) for block in OTHERS[:4]] == [10, 11, 12, 0]


def test_a_request_that_another_connector_serves_holds_nothing(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    assert engine.matched(second) == WHOLE
    engine.allocate(second, OTHERS, 0)
    assert engine.side.leader.table.held() == {}


def test_a_request_that_must_not_read_caches_is_not_matched(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    second.skip_reading_prefix_cache = True
    assert engine.matched(second) == 0


def test_generated_tokens_are_cached_once_their_block_is_computed(connect: Any) -> None:
    engine = connect()
    request = engine.request("first", PROMPT[: 2 * BLOCK - 1])
    engine.allocate(request, [1, 2])
    engine.step({"first": 2 * BLOCK - 1}, lambda: engine.fill([1, 2], 10))
    request.append_output_token_ids(99)  # completes the second block, its KV does not exist yet
    engine.run_until(lambda: not engine.side.leader._storing)
    longer = [*PROMPT[: 2 * BLOCK - 1], 99, 5]
    assert engine.matched(engine.request("early", longer)) == BLOCK
    engine.step({"first": 1}, lambda: engine.fill([1, 2], 10))
    engine.run_until(lambda: not engine.side.leader._storing)
    assert engine.matched(engine.request("late", longer)) == 2 * BLOCK


def test_draft_tokens_are_not_stored_under_anybodys_name(connect: Any) -> None:
    engine = connect()
    request = engine.request("first", PROMPT[: BLOCK - 2])
    engine.allocate(request, [1, 2])
    # 14 tokens and 3 drafts fill the block, but it is not known which tokens it will hold.
    engine.step({"first": BLOCK + 1}, lambda: engine.fill([1], 66))
    assert engine.side.leader._storing == {}
    request.num_computed_tokens -= 3  # all drafts rejected
    for token in (7, 8):
        request.append_output_token_ids(token)
        engine.step({"first": 1}, lambda: engine.fill([1], 10))
    engine.run_until(lambda: not engine.side.leader._storing)
    prompt = [*PROMPT[: BLOCK - 2], 7, 8, 9]
    assert engine.load(engine.request("second", prompt), [11, 12]) == BLOCK
    assert engine.value(11) == 10


# ---- preemption ----------------------------------------------------------------------------------
@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
def test_a_preempted_request_stops_its_stores(connect: Any, named: bool) -> None:
    engine = connect()
    request = engine.request("first", PROMPT)
    engine.allocate(request, BLOCKS)
    metadata = engine.schedule(engine.output({"first": len(PROMPT)}))
    request.num_preemptions += 1
    request.num_computed_tokens = 0
    stop = engine.schedule(engine.output(preempted=["first"] if named else []))
    assert stop.step.stop
    engine.execute(metadata, lambda: engine.fill(BLOCKS, 10))
    engine.execute(stop, lambda: engine.fill(BLOCKS, 55))
    engine.run_until(lambda: not engine.side.leader._uncollected)
    tokens = engine.matched(engine.request("second", PROMPT))
    engine.allocate(engine.requests["second"], OTHERS, tokens)
    if tokens:  # copies that were faster than the preemption
        engine.run_until(lambda: "second" in engine.received)
        assert [engine.value(b) for b in OTHERS[: tokens // BLOCK]] == [10, 11, 12, 13][
            : tokens // BLOCK
        ]


@pytest.mark.parametrize("as_new", [False, True], ids=["resumed", "as new"])
def test_preempted_and_resumed_in_one_step_is_stored_from_its_new_blocks(
    connect: Any, as_new: bool
) -> None:
    engine = connect()
    request = engine.request("first", PROMPT[: 2 * BLOCK + 1])
    engine.allocate(request, [1, 2, 3])
    engine.schedule(engine.output({"first": 5}))
    request.num_preemptions += 1
    request.num_computed_tokens = 0
    assert engine.matched(request) == 0
    engine.allocate(request, [7, 8, 9])
    output = engine.output(
        {"first": 2 * BLOCK}, resumed=["first"], preempted=["first"], resumed_are_new=as_new
    )
    engine.execute(engine.schedule(output), lambda: engine.fill([7, 8], 10))
    engine.step({"first": 1}, lambda: engine.fill([1, 2, 3], 44))
    engine.run_until(lambda: not engine.side.leader._storing)
    assert engine.load(engine.request("second", PROMPT[: 2 * BLOCK + 1]), [11, 12]) == 2 * BLOCK
    assert [engine.value(block) for block in (11, 12)] == [10, 11]


# ---- end of a request ----------------------------------------------------------------------------
def test_a_finished_request_is_told_as_sent_once(connect: Any) -> None:
    engine = connect()
    request = engine.request("first", PROMPT)
    engine.allocate(request, BLOCKS)
    metadata = engine.schedule(engine.output({"first": len(PROMPT)}))
    assert engine.scheduler.request_finished(request, BLOCKS) == (True, None)
    assert engine.scheduler.has_pending_block_frees()
    engine.execute(metadata, lambda: engine.fill(BLOCKS, 10))
    engine.run_until(lambda: "first" in engine.sent)
    engine.sent.clear()
    for _ in range(3):
        engine.step()
    assert engine.sent == set()
    assert not engine.scheduler.has_pending_block_frees()


def test_a_request_that_was_never_scheduled_is_not_kept(connect: Any) -> None:
    engine = connect()
    assert engine.scheduler.request_finished(engine.request("first", PROMPT), []) == (False, None)
    second = engine.request("second", PROMPT)
    engine.matched(second)
    assert engine.scheduler.request_finished(second, []) == (False, None)


def test_a_streaming_session_that_drops_its_last_token_goes_on(connect: Any) -> None:
    engine = connect()
    session = engine.request("session", PROMPT[: 2 * BLOCK])
    engine.allocate(session, [1, 2, 3])
    engine.step({"session": 2 * BLOCK}, lambda: engine.fill([1, 2], 10))
    session.append_output_token_ids(99)
    # The scheduler discards the token that was sampled last and appends the next input.
    del session._all_token_ids[2 * BLOCK :]
    session._output_token_ids.clear()
    session._all_token_ids.extend(PROMPT[2 * BLOCK : 3 * BLOCK])
    session.update_block_hashes()
    engine.step({"session": BLOCK}, lambda: engine.fill([1, 2, 3], 10))
    engine.run_until(lambda: not engine.side.leader._storing)
    assert engine.matched(engine.request("second", PROMPT)) == 3 * BLOCK


# ---- load errors ---------------------------------------------------------------------------------
def test_with_several_groups_a_load_fails_as_a_whole(connect: Any) -> None:
    engine = connect(groups=2)
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    tokens = engine.matched(second)
    engine.allocate(second, OTHERS, tokens)
    for handle in engine.side.leader.sequences["second"].loads:
        engine.side.leader.table.cancel(handle)
    engine.run_until(lambda: "second" in engine.received)
    if compat.VERSION >= (0, 30):
        assert engine.failed == {"second"}
        assert engine.missing == set()


def test_with_one_group_a_failed_load_names_its_blocks(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    engine.allocate(second, OTHERS, engine.matched(second))
    for handle in engine.side.leader.sequences["second"].loads:
        engine.side.leader.table.cancel(handle)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.failed == set()
    assert engine.missing == set(OTHERS[:4])
    assert engine.matched(second) == 0  # vLLM asks again: it is computed now
    assert engine.matched(engine.request("third", PROMPT)) == 0  # its first block is suspect


def test_an_allocation_that_is_not_understood_is_reported_as_failed(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    tokens = engine.matched(second)
    wrong = SimpleNamespace(get_block_ids=lambda: (OTHERS[:4], OTHERS[:4]))  # one group too many
    engine.scheduler.update_state_after_alloc(second, wrong, tokens)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == set(OTHERS[:4])


def test_a_request_with_another_number_of_hashes_than_expected_is_not_cached(connect: Any) -> None:
    engine = connect()
    request = engine.request("first", PROMPT)
    request.block_hashes += [b"x" * 32]
    assert engine.matched(request) == 0
    engine.allocate(request, BLOCKS)
    engine.step({"first": len(PROMPT)})
    assert engine.side.leader.sequences == {}
    assert engine.side.segment.counters()["errors"] > 0


@pytest.mark.parametrize("policy", [None, "recompute", "fail"])
def test_the_failure_policy_is_that_of_the_settings(connect: Any, policy: str | None) -> None:
    engine = connect(load_failure_policy=policy)
    set_for_vllm = engine.scheduler._kv_transfer_config.kv_load_failure_policy
    assert set_for_vllm == (policy or "recompute")
    assert not engine.scheduler.requires_kv_delivery


# ---- metadata, reset, statistics -----------------------------------------------------------------
def test_metadata_survives_pickling(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    second = engine.request("second", PROMPT)
    engine.allocate(second, OTHERS, engine.matched(second))
    metadata = pickle.loads(pickle.dumps(engine.schedule(engine.output())))
    assert metadata.step.loads["second"].device_blocks == OTHERS[:4]
    engine.execute(metadata)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.value(11) == 10


def test_reset_forgets_everything(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    assert engine.scheduler.reset_cache() is True
    assert engine.matched(engine.request("second", PROMPT)) == 0


def test_an_unknown_kind_of_metadata_is_left_alone(connect: Any) -> None:
    engine = connect()
    engine.worker.handle_preemptions(SimpleNamespace())
    engine.worker.bind_connector_metadata(SimpleNamespace())
    assert engine.worker.has_connector_metadata()
    engine.worker.clear_connector_metadata()


def test_statistics_are_differences_and_reach_prometheus(connect: Any) -> None:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    engine = connect()
    engine.scheduler.get_kv_connector_stats()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)
    engine.load(engine.request("second", PROMPT), OTHERS)
    engine.side._stats._at = 0.0
    stats = engine.scheduler.get_kv_connector_stats()
    moved = stats.data["moved"]
    assert moved["blocks_stored"] == moved["blocks_loaded"] == 4
    assert not stats.is_empty()
    engine.side._stats._at = 0.0
    again = engine.scheduler.get_kv_connector_stats()
    assert (again is not None) == compat.STATS_GET_LOST
    assert again is None or again.data == {"moved": {}, "total": stats.data["total"]}

    again = type(engine.scheduler).build_kv_connector_stats(dict(stats.data))
    both = type(again)().aggregate(stats).aggregate(again)
    assert both.data["moved"]["blocks_stored"] == 8
    assert both.data["total"]["blocks_stored"] == 4
    assert both.reduce()["blocks loaded"] == 8

    registry = CollectorRegistry()

    kinds = {Counter: partial(Counter, registry=registry), Gauge: Gauge, Histogram: Histogram}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = type(engine.scheduler).build_prom_metrics(config, kinds, ["engine"], {0: ["0"]})
    metrics.observe(stats.data, 0)
    labels = {"engine": "0"}
    assert registry.get_sample_value("kvbm_offload_blocks_d2h_total", labels) == 4
    assert registry.get_sample_value("kvbm_matched_tokens_total", labels) == WHOLE


def test_a_report_that_was_lost_is_made_up_for_in_prometheus() -> None:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    registry = CollectorRegistry()
    kinds = {Counter: partial(Counter, registry=registry), Gauge: Gauge, Histogram: Histogram}
    metrics = KvbmPromMetrics(
        SimpleNamespace(kv_transfer_config=None), kinds, ["engine"], {0: ["0"], 1: ["1"]}
    )
    reports = [
        KvbmStats.of({"blocks_loaded": 2}, {"blocks_loaded": 2}),
        KvbmStats.of({"blocks_loaded": 3}, {"blocks_loaded": 5}),  # lost
        KvbmStats.of({"evicted": 1}, {"blocks_loaded": 6, "evicted": 1, "worker_errors.0": 2}),
    ]
    metrics.observe(reports[0].data, 1)
    metrics.observe(reports[2].data, 1)
    name, labels = "kvbm_onboard_blocks_h2d_total", {"engine": "1"}
    assert registry.get_sample_value(name, labels) == 6
    metrics.observe(KvbmStats.of({}, {"worker_errors.0": 2, "worker_errors.1": 5}).data, 1)
    assert registry.get_sample_value("kvbm_errors_total", labels) == 7
    assert registry.get_sample_value(name, {"engine": "0"}) == 0
