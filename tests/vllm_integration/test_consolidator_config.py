# SPDX-License-Identifier: Apache-2.0
"""When an engine's KV events are consolidated, and at which endpoints."""

from __future__ import annotations

import builtins
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_events import KVEventsConfig

from kvbm.vllm_integration import consolidator_config
from kvbm.vllm_integration.consolidator_config import (
    data_parallel_rank,
    engine_endpoints,
    get_consolidator_endpoints,
    should_enable_consolidator,
    start_events,
)
from kvbm.vllm_integration.engine import settings_of
from tests.events.sockets import free_base_port

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds


def configuration(endpoint: str = "tcp://*:5557", **changes: Any) -> Any:
    """What is read of a VllmConfig."""
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)
    for name in ("enable_kv_cache_events", "publisher", "replay_endpoint", "topic"):
        if name in changes:
            setattr(events, name, changes.pop(name))
    extra = changes.pop("extra", {})
    fields = {
        "kv_events_config": events,
        "kv_transfer_config": SimpleNamespace(
            kv_connector=changes.pop("connector", "DynamoConnector"),
            kv_connector_extra_config=extra,
            engine_id="engine",
        ),
        "cache_config": SimpleNamespace(enable_prefix_caching=changes.pop("prefix_caching", True)),
        "parallel_config": SimpleNamespace(data_parallel_rank=0, data_parallel_index=0),
        "additional_config": {},
    }
    return SimpleNamespace(**(fields | changes))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the tests is."""
    for name in ("KV_EVENTS_ENABLE_CONSOLIDATOR", "LEADER_ZMQ_PUB_PORT"):
        monkeypatch.delenv(f"DYN_KVBM_{name}", raising=False)


def test_events_are_consolidated_at_upstreams_ports() -> None:
    assert should_enable_consolidator(configuration())
    assert get_consolidator_endpoints(configuration()) == (
        "tcp://127.0.0.1:5557",
        "tcp://0.0.0.0:57001",
        "tcp://127.0.0.1:57001",
    )


def test_inside_another_connector_they_are_too() -> None:
    extra = {"connectors": [{"kv_connector": "DynamoConnector"}, {"kv_connector": "NixlConnector"}]}
    assert should_enable_consolidator(configuration(connector="PdConnector", extra=extra))


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_events_config": None},
        {"enable_kv_cache_events": False},
        {"publisher": "null"},
        {"prefix_caching": False},
        {"connector": "NixlConnector"},
        {"connector": "PdConnector", "extra": {"connectors": [{"kv_connector": "Other"}]}},
        {"endpoint": "tcp://*:0"},
        {"endpoint": "tcp://router:5557"},  # vLLM connects to it: there is nothing to subscribe to
        {"extra": {"kv_events_enable_consolidator": False}},
    ],
)
def test_nothing_is_consolidated_where_something_stands_against_it(changes: Any) -> None:
    assert not should_enable_consolidator(configuration(**changes))
    assert get_consolidator_endpoints(configuration(**changes)) is None
    assert start(configuration(**changes)) is None


def test_the_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "6000")
    found = get_consolidator_endpoints(configuration())
    assert found is not None
    assert found[1:] == ("tcp://0.0.0.0:7000", "tcp://127.0.0.1:7000")
    monkeypatch.setenv("DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR", "0")
    assert not should_enable_consolidator(configuration())


def test_a_port_above_the_highest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "65000")
    with pytest.raises(ValueError, match="66000"):
        get_consolidator_endpoints(configuration())


@pytest.mark.parametrize("rank", [0, 3])
def test_each_data_parallel_rank_has_endpoints_of_its_own(rank: int) -> None:
    found = engine_endpoints(configuration(replay_endpoint="tcp://*:6557", topic="kv"), rank)
    assert found is not None
    assert (found.engine, found.engine_replay) == (
        f"tcp://127.0.0.1:{5557 + rank}",
        f"tcp://127.0.0.1:{6557 + rank}",
    )
    assert (found.output, found.replay) == (
        f"tcp://0.0.0.0:{57001 + rank}",
        f"tcp://0.0.0.0:{58001 + rank}",
    )
    assert found.topic == "kv"


def test_vllm_gets_a_replay_endpoint_if_it_has_none() -> None:
    config = configuration()
    found = engine_endpoints(config, 2)
    assert found is not None
    # Its publisher, made later, moves this one up for the rank by itself.
    assert config.kv_events_config.replay_endpoint == "inproc://kvbm-replay-engine"
    assert found.engine_replay == "inproc://kvbm-replay-engine_dp2"


def test_endpoints_that_were_computed_before_are_used() -> None:
    given = ["tcp://127.0.0.1:1", "tcp://0.0.0.0:2", "tcp://127.0.0.1:2"]
    config = configuration(additional_config={"consolidator_endpoints": given})
    found = engine_endpoints(config, 0)
    assert found is not None
    assert (found.engine, found.output, found.replay) == (given[0], given[1], "tcp://0.0.0.0:1002")
    config = configuration(additional_config={"consolidator_endpoints": None})
    assert engine_endpoints(config, 0) is None


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"data_parallel_rank": 2}, 2),
        ({"data_parallel_rank": 0, "data_parallel_index": 3}, 3),  # a dense model
    ],
)
def test_the_rank_is_that_of_the_engine(fields: dict[str, int], rank: int) -> None:
    assert data_parallel_rank(SimpleNamespace(**fields)) == rank


def start(config: Any) -> Any:
    """Start the events of an engine without a disk tier."""
    return start_events(config, settings_of(config), "no-such", 1, False, lambda: False)


def test_a_missing_library_costs_the_events_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "kvbm.events.zmq_consolidator":
            raise ImportError("No module named 'zmq'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert start(configuration()) is None
    assert "No module named 'zmq'" in caplog.text
    assert "kvbm[events]" in caplog.text


def test_a_surprise_costs_the_events_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(consolidator_config, "data_parallel_rank", lambda _: 1 / 0)
    assert start(configuration()) is None
    assert "the engine goes on without" in caplog.text


def test_an_engines_events_are_published() -> None:
    port = free_base_port() + 1000
    given = ["tcp://127.0.0.1:5557", *[f"tcp://127.0.0.1:{port}"] * 2]
    config = configuration(additional_config={"consolidator_endpoints": given})
    made = start(config)
    assert made is not None
    with closing(made):
        assert made.endpoint == given[1]
        assert made.replay_endpoint == f"tcp://127.0.0.1:{port + 1000}"
