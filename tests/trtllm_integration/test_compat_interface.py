# SPDX-License-Identifier: Apache-2.0
"""Every name of TensorRT-LLM that kvbm reads is in the recorded interface, and it implements it.

The recording (`interface`) stands for TensorRT-LLM, which is not installed for the tests: who
supports another version records it there first, and sees here what does not fit.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvbm.trtllm_integration
from tests.trtllm_integration import interface as recorded
from tests.trtllm_integration.interface import installed

SOURCES = Path(kvbm.trtllm_integration.__file__).parent
# Name of a variable in the sources: what may be read of it.
READ: dict[str, set[str]] = {
    "request": recorded.REQUEST,
    "data": set(recorded.REQUEST_DATA["1.2"]) & set(recorded.REQUEST_DATA["1.3"]),
    "output": set(recorded.SCHEDULER_OUTPUT["1.2"]) & set(recorded.SCHEDULER_OUTPUT["1.3"]),
    "llm_args": recorded.ARGUMENTS,
    "mapping": recorded.MAPPING,
    "cache": recorded.CACHE_CONFIG,
    "quantization": recorded.CACHE_CONFIG,
    "kv_cache_config": recorded.CACHE_CONFIG,
    "parallel_config": recorded.MAPPING,
    "to_mapping": recorded.MAPPING,
}
OPTIONAL = {"priorities"}  # read where it is


def base(node: ast.expr) -> str:
    """Last name of what an attribute is read of."""
    if isinstance(node, ast.Call):
        return base(node.func)
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def reads(source: str) -> Iterator[tuple[str, str]]:
    """Pairs of variable and attribute, also those that are read by `getattr`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield base(node.value).lstrip("_"), node.attr
        elif isinstance(node, ast.Call) and base(node.func) == "getattr":
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield base(node.args[0]).lstrip("_"), str(name.value)


def unlisted(source: str) -> set[tuple[str, str]]:
    """What is read and not recorded."""
    return {
        (name, attribute)
        for name, attribute in reads(source)
        if name in READ and attribute not in READ[name] | OPTIONAL
    }


FILES = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_read_that_is_not_recorded(file: str) -> None:
    assert unlisted((SOURCES / file).read_text()) == OURS.get(file, set())


OURS = {
    # Variables of these names that are kvbm's own.
    "connector_leader.py": {
        ("cache", name) for name in ("leader", "segment", "disk_is_open", "hits", "close")
    },
}


@pytest.mark.parametrize(
    "source",
    ["request.priority", "getattr(data, 'block_hashes')", "self._llm_args.zone",
     "llm_args.parallel_config.to_mapping().dp_size"],
)  # fmt: skip
def test_a_name_that_is_not_recorded_is_seen(source: str) -> None:
    assert unlisted(source) != set()


def test_the_names_of_other_inputs_are_recorded() -> None:
    with installed():
        from kvbm.trtllm_integration.request_keys import OTHER_INPUTS

        assert set(OTHER_INPUTS) <= recorded.REQUEST


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_all_methods_take_what_tensorrt_llm_gives(version: str) -> None:
    with installed(version) as module:
        from kvbm.trtllm_integration import connector

        sides = (
            (connector.DynamoKVBMConnectorLeader, module.KvCacheConnectorScheduler,
             recorded.SCHEDULER_METHODS | recorded.SCHEDULER_DEFAULTS[version]),
            (connector.DynamoKVBMConnectorWorker, module.KvCacheConnectorWorker,
             recorded.WORKER_METHODS | recorded.WORKER_DEFAULTS[version]),
        )  # fmt: skip
        for ours, theirs, methods in sides:
            assert issubclass(ours, theirs)
            assert not ours.__abstractmethods__
            for name, expected in methods.items():
                if name in vars(ours):
                    assert list(inspect.signature(vars(ours)[name]).parameters)[1:] == expected


def test_methods_for_several_layer_groups_are_theirs() -> None:
    """Their defaults refuse what is not one group, so they must not be implemented by halves."""
    with installed():
        from kvbm.trtllm_integration import connector

        own = set(vars(connector.DynamoKVBMConnectorLeader))
        assert not own & {
            "request_finished_by_layer_group", "update_state_after_alloc_by_layer_group",
        }  # fmt: skip
        assert not getattr(connector.DynamoKVBMConnectorLeader, "supports_attention_dp", False)


def test_a_version_without_the_interface_says_what_is_needed() -> None:
    import sys

    with installed("1.3"):
        module = sys.modules.pop(recorded.MODULES["1.3"])
        try:
            with pytest.raises(ImportError, match=r"kvbm needs 1\.2\.0rc2 or newer"):
                from kvbm.trtllm_integration import compat  # noqa: F401
        finally:
            sys.modules[recorded.MODULES["1.3"]] = module


def test_the_first_ranks_value_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed():
        from kvbm.trtllm_integration import compat

        asked: list[Any] = []

        def broadcast(value: Any, root: int) -> Any:
            asked.append((value, root))
            return "first"

        monkeypatch.setattr(compat, "mpi_broadcast", broadcast)
        assert compat.from_first_rank("second") == "first"
        assert asked == [("second", 0)]


def test_priorities_are_read_where_they_are() -> None:
    with installed():
        from kvbm.trtllm_integration.compat import priorities_of

        assert priorities_of(SimpleNamespace()) is None
        assert priorities_of(SimpleNamespace(priorities=[3])) == [3]
