# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: kvbm's connector under the names of others, for vLLM's own tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import vllm.distributed.kv_transfer.kv_connector.factory as vllm_factory

from kvbm.instance import SHARED_MEMORY
from scripts.vllm_units import rig
from scripts.vllm_units.selection import is_selected, why_not

# Those that stand for "a connector" in vLLM's tests. None of them supports the hybrid manager.
REPLACED = frozenset(
    {"ExampleConnector", "MockKVConnector", "NixlConnector", "TestExampleConnector"}
)


def replace_by_name() -> None:
    """Have vLLM load kvbm's connector, by name and module path, wherever a test names another."""
    factory = vllm_factory.KVConnectorFactory
    original = factory.get_connector_class.__func__

    def get_connector_class(cls: Any, kv_transfer_config: Any) -> Any:
        if kv_transfer_config.kv_connector in REPLACED:
            kv_transfer_config.kv_connector = "DynamoConnector"
            kv_transfer_config.kv_connector_module_path = rig.__name__
        return original(cls, kv_transfer_config)

    factory.get_connector_class = classmethod(get_connector_class)


def replace_mocks() -> None:
    """Have the mocks that tests put into a scheduler be its own connector, under their handles."""
    from tests.v1.kv_connector.unit import utils

    if hasattr(utils, "create_mock_connector"):
        utils.create_mock_connector = rig.OverMock


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    replace_by_name()
    replace_mocks()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has no connector; skip what the connector is not meant to pass."""
    others = [item for item in items if not is_selected(item.nodeid)]
    items[:] = [item for item in items if is_selected(item.nodeid)]
    config.hook.pytest_deselected(items=others)
    for item in items:
        reason = why_not(item.nodeid)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"kvbm: {reason}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that wants what the connector never does is skipped, with that as the reason."""
    try:
        return (yield)
    except rig.NotOurs as answer:
        pytest.skip(f"kvbm: {answer}")


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    """End the engines of a test, and fail if a hook failed or an object is left."""
    yield
    ended, rig.ENGINES[:] = list(rig.ENGINES), []
    for engine in ended:
        for worker in engine.workers:
            worker.shutdown()
        engine.shutdown()
    errors = sum(engine.call_record["errors"] for engine in ended)
    assert errors == 0, f"{errors} hooks failed; see the log"
    left = [p.name for e in ended for p in SHARED_MEMORY.glob(f"kvbm-{e.instance}*")]
    assert left == []
