# SPDX-License-Identifier: Apache-2.0
"""With `DYN_KVBM_TRTLLM_ZMQ_PORT` the engine's events and the tiers' are one stream; else none."""

from __future__ import annotations

import builtins
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from kvbm.config import load_settings
from kvbm.errors import ConfigError
from kvbm.events.index import EventIndex
from kvbm.events.zmq_receiver import BatchReceiver
from kvbm.trtllm_integration.consolidator_config import (
    get_consolidator_endpoints,
    should_enable_consolidator,
    start_events,
)
from tests.events.sockets import free_base_port
from tests.leaks import wait_until
from tests.small_engine import DEADLINE_S
from tests.trtllm_integration.engine import BLOCK, Engine, Request

Serve = Callable[..., Engine]
PROMPT = list(range(3, 3 + 2 * BLOCK + 5))  # two blocks and a bit
OURS = "kvbm.trtllm_integration.connector"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kv_connector_config": {"connector_module": OURS}}, True),
        ({"kv_connector_config": SimpleNamespace(connector_module=OURS, connector=None)}, True),
        ({"kv_connector_config": {"connector": "kvbm"}}, True),
        ({"kv_connector_config": SimpleNamespace(connector_module=None, connector="kvbm")}, True),
        ({"kv_connector_config": {"connector": "lmcache"}}, False),
        ({"kv_connector_config": None}, False),
        ({}, False),
        (None, False),
    ],
    ids=str,
)
def test_events_are_consolidated_for_our_connector(arguments: Any, expected: bool) -> None:
    assert should_enable_consolidator(arguments) == expected


def test_events_are_not_consolidated_if_somebody_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR", "0")
    monkeypatch.setenv("DYN_KVBM_TRTLLM_ZMQ_PORT", "20081")
    assert not should_enable_consolidator({"kv_connector_config": {"connector_module": OURS}})
    assert start_events(load_settings(), "p-0", lambda: False) is None


def test_the_ports_are_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_consolidator_endpoints() == (
        "tcp://*:56001", "tcp://0.0.0.0:57001", "tcp://127.0.0.1:57001",
    )  # fmt: skip
    monkeypatch.setenv("DYN_KVBM_TRTLLM_ZMQ_PORT", "20081")
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "6000")
    assert get_consolidator_endpoints() == (
        "tcp://*:20081", "tcp://0.0.0.0:7000", "tcp://127.0.0.1:7000",
    )  # fmt: skip
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "65000")
    with pytest.raises(ValueError, match="above 65535"):
        get_consolidator_endpoints()


def test_without_the_port_a_line_says_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert start_events(load_settings(), "p-0", lambda: False) is None
    assert "DYN_KVBM_TRTLLM_ZMQ_PORT" in caplog.text


@pytest.mark.parametrize("port", ["0", "65536", "many", "tcp://127.0.0.1:20081"])
def test_a_port_that_is_none_ends_the_start(
    interface: Any, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    from kvbm.trtllm_integration.connector import DynamoKVBMConnectorLeader

    monkeypatch.setenv("DYN_KVBM_TRTLLM_ZMQ_PORT", port)
    with pytest.raises(ConfigError, match="DYN_KVBM_TRTLLM_ZMQ_PORT"):
        DynamoKVBMConnectorLeader(SimpleNamespace())


def test_without_the_libraries_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DYN_KVBM_TRTLLM_ZMQ_PORT", "20081")
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "kvbm.events.zmq_consolidator":
            raise ImportError("No module named 'zmq'")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert start_events(load_settings(), "p-0", lambda: False) is None
    assert "no KV events: No module named 'zmq'" in caplog.text


class Publisher:
    """What `dynamo.trtllm` does with TensorRT-LLM's events: one a batch, in maps."""

    def __init__(self) -> None:
        self.socket = zmq.Context.instance().socket(zmq.PUB)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.sent = 0

    def send(self, event: dict[str, Any]) -> None:
        """Publish one event."""
        payload = msgspec.msgpack.encode([1.5, [event], 0])
        self.socket.send_multipart([b"", struct.pack(">Q", self.sent), payload])
        self.sent += 1

    def stored(self, hashes: list[int], tokens: list[int]) -> None:
        """Blocks of a prompt are on the device; hashes are signed there."""
        self.send(
            {
                "type": "BlockStored",
                "block_hashes": [value - 2**64 if value >= 2**63 else value for value in hashes],
                "parent_block_hash": None,
                "token_ids": tokens,
                "block_size": BLOCK,
            }
        )

    def removed(self, hashes: list[int]) -> None:
        """Blocks have left the device."""
        self.send({"type": "BlockRemoved", "block_hashes": hashes})

    def close(self) -> None:
        """Close the socket."""
        self.socket.close(0)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """An engine's publisher."""
    made = Publisher()
    yield made
    made.close()


def test_the_engines_events_and_the_tiers_are_one_stream(
    serve: Serve, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = free_base_port()
    monkeypatch.setenv("DYN_KVBM_TRTLLM_ZMQ_PORT", str(publisher.port))
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", str(base))
    engine = serve()
    index = EventIndex()
    receiver = BatchReceiver(f"tcp://127.0.0.1:{base + 1000}", f"tcp://127.0.0.1:{base + 2000}")
    with closing(receiver):

        def hears(condition: Callable[[], bool]) -> bool:
            for batch in receiver.receive(0.01):
                index.apply(batch)
            return condition()

        def subscribed() -> bool:
            publisher.stored([99], [1] * BLOCK)
            return hears(lambda: 99 in index.blocks)

        assert wait_until(subscribed, DEADLINE_S)
        hashes = {2**63 + 5, 11}
        publisher.stored([2**63 + 5, 11], PROMPT[: 2 * BLOCK])
        assert wait_until(lambda: hears(lambda: hashes <= set(index.blocks)), DEADLINE_S)
        engine.serve(Request(1, list(PROMPT)))
        assert engine.counter("published") == 2
        publisher.removed([11])
        publisher.removed([2**63 + 5 - 2**64])
        publisher.stored([7], [2] * BLOCK)
        assert wait_until(lambda: hears(lambda: 7 in index.blocks), DEADLINE_S)
        assert hashes <= set(index.blocks)  # they have left the device, and are in host memory
        engine.side.leader.reset()
        assert wait_until(lambda: hears(lambda: set(index.blocks) == {7, 99}), DEADLINE_S)


def test_a_port_in_use_costs_the_events_and_nothing_else(
    serve: Serve, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = free_base_port()
    monkeypatch.setenv("DYN_KVBM_TRTLLM_ZMQ_PORT", str(publisher.port))
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", str(base))
    first, second = serve(), serve()
    assert first.side._events is not None
    assert second.side._events is None
    second.serve(Request(1, list(PROMPT)))
    second.serve(Request(2, list(PROMPT)))
    assert second.loaded[2] == 2 * BLOCK
