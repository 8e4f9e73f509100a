# SPDX-License-Identifier: Apache-2.0
"""No hook raises: a surprise costs a request its cache, a count and one log line."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1 import base

from kvbm.step import StepMetadata
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.connector import DynamoConnector, DynamoConnectorMetadata
from kvbm.vllm_integration.stats import KvbmPromMetrics, KvbmStats

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds

BLOCK = 16
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
WHOLE = 4 * BLOCK
BLOCKS = [1, 2, 3, 4, 5]
OTHERS = [11, 12, 13, 14, 15]

STEP = DynamoConnectorMetadata(StepMetadata())
HOOKS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("get_num_new_matched_tokens", (SimpleNamespace(), 0), (0, False)),
    ("update_state_after_alloc", (SimpleNamespace(), SimpleNamespace(), 0), None),
    ("build_connector_meta", (SimpleNamespace(),), STEP),
    ("request_finished", (SimpleNamespace(), []), (False, None)),
    ("update_connector_output", (SimpleNamespace(),), None),
    ("reset_cache", (), False),
    ("has_pending_block_frees", (), False),
    ("get_kv_connector_stats", (), None),
    ("handle_preemptions", (STEP,), None),
    ("bind_connector_metadata", (STEP,), None),
    ("get_finished", (set(),), (None, None)),
    ("get_block_ids_with_load_errors", (), set()),
    ("wait_for_save", (), None),
    ("shutdown", (), None),
]
if hasattr(base, "KVConnectorTransferResults"):  # 0.30
    HOOKS.append(("get_transfer_results", (set(),), compat.transfer_results((), (), ())))
# At the start an error is one for the user. The others do nothing that can fail.
AT_START = {"register_kv_caches", "build_prom_metrics"}
CONSTANT = {"requires_kv_delivery", "supports_sleep_mode", "settings"}
NOTHING = {"start_load_kv", "wait_for_layer_load", "save_kv_layer", "get_transfer_results"}
WITHOUT_INSTANCE = {"build_kv_connector_stats"}


class Broken:
    """A side of the connector that fails whatever it is asked, its counters included if so."""

    def __init__(self, counts: bool) -> None:
        self.counted = 0
        self._counts = counts

    def count_error(self) -> None:
        self.counted += 1
        if not self._counts:
            raise RuntimeError("the counters are broken")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} is broken")


@pytest.mark.parametrize("counts", [True, False], ids=["counted", "counters broken"])
@pytest.mark.parametrize(("hook", "arguments", "fallback"), HOOKS, ids=[h[0] for h in HOOKS])
def test_no_hook_raises(
    connect: Any,
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    arguments: Any,
    fallback: Any,
    counts: bool,
) -> None:
    broken = Broken(counts)
    engine = connect()
    monkeypatch.setattr(engine.scheduler, "_leader", broken)
    monkeypatch.setattr(engine.scheduler, "_worker", broken)
    assert getattr(engine.scheduler, hook)(*arguments) == fallback
    assert broken.counted
    monkeypatch.undo()


def test_every_hook_is_among_those_that_were_broken() -> None:
    own = {name for name in vars(DynamoConnector) if not name.startswith("_")}
    tried = {hook for hook, _, _ in HOOKS} | {"count_error"}
    assert own - tried - AT_START - CONSTANT - NOTHING - WITHOUT_INSTANCE == set()


def test_statistics_that_are_not_understood_do_not_end_the_front_end() -> None:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    nonsense = KvbmStats(data={"moved": None, "total": {"blocks_loaded": "many"}})
    assert nonsense.is_empty()
    assert nonsense.reduce() == {}
    good = KvbmStats.of({"blocks_loaded": 2}, {"blocks_loaded": 2})
    assert good.aggregate(nonsense) is good
    assert good.data["moved"] == {"blocks_loaded": 2}
    assert DynamoConnector.build_kv_connector_stats(7).is_empty()

    registry = CollectorRegistry()
    kinds = {Counter: partial(Counter, registry=registry), Gauge: Gauge, Histogram: Histogram}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = KvbmPromMetrics(config, kinds, ["engine"], {0: ["0"]})
    metrics.observe(nonsense.data, 0)
    metrics.observe(good.data, 7)  # an engine that it does not know
    metrics.observe(good.data, 0)
    assert registry.get_sample_value("kvbm_onboard_blocks_h2d_total", {"engine": "0"}) == 2


# ---- what a surprise must not break --------------------------------------------------------------
def test_a_step_that_is_not_understood_loses_no_load(
    connect: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)

    def note(_: Any) -> None:
        raise RuntimeError("another scheduler output")

    monkeypatch.setattr(engine.side, "_note_step", note)
    assert engine.load(engine.request("second", PROMPT), OTHERS) == WHOLE
    assert [engine.value(block) for block in OTHERS[:4]] == [10, 11, 12, 13]
    assert engine.missing == set()
    engine.step()
    assert engine.side.segment.counters()["errors"] > 1
    assert caplog.text.count("a step was not understood") == 1


def test_after_a_step_that_is_not_understood_nothing_of_its_requests_is_stored(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect()
    first = engine.request("first", PROMPT)
    assert engine.matched(first) == 0
    engine.allocate(first, BLOCKS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(engine.side, "_runs", None)  # what it is told of one request ...
        patch.setattr(engine.side, "_per_request", lambda *_: 1 / 0)  # ... and of all
        engine.step({"first": BLOCK}, lambda: engine.fill(BLOCKS[:1], 10))
    # Its second block was named in a step that was understood; the first ones were not.
    engine.step({"first": BLOCK}, lambda: engine.fill([2], 20), new_blocks={"first": [2]})
    engine.scheduler.request_finished(first, BLOCKS[:2])
    engine.step()
    assert engine.side.segment.counters()["published"] == 0
    assert engine.matched(engine.request("second", PROMPT)) == 0


def test_copies_that_cannot_be_stopped_do_not_cost_the_step_its_loads(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect()
    engine.cache(engine.request("first", PROMPT), BLOCKS, 10)

    def stop(_: Any) -> None:
        raise RuntimeError("no stream")

    monkeypatch.setattr(engine.worker._worker._worker, "stop_copies", stop)
    assert engine.load(engine.request("second", PROMPT), OTHERS) == WHOLE
    assert engine.missing == set()
