# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that kvbm reads is there, in the vLLM that is installed.

The first test to look at on a new version: what is missing here would show elsewhere as a request
that is not cached, since no hook may raise.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1 import base

import kvbm.vllm_integration
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.connector import DynamoConnector
from tests.vllm_integration.connected import block_hasher, cache_configuration

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds

SOURCES = Path(kvbm.vllm_integration.__file__).parent
DOCUMENT = SOURCES.parents[1] / "docs" / "vllm.md"

# Class: fields or attributes that are read of it.
FIELDS: dict[str, set[str]] = {
    "vllm.v1.core.sched.output:SchedulerOutput": {
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "preempted_req_ids",
    },
    "vllm.v1.core.sched.output:NewRequestData": {"req_id", "block_ids", "num_computed_tokens"},
    "vllm.v1.core.sched.output:CachedRequestData": {
        "req_ids",
        "resumed_req_ids",
        "new_block_ids",
        "num_computed_tokens",
    },
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": {"get_block_ids"},
    "vllm.v1.outputs:KVConnectorOutput": {
        "finished_sending",
        "finished_recving",
        "invalid_block_ids",
    },
    "vllm.v1.kv_cache_interface:KVCacheConfig": {"num_blocks", "kv_cache_groups"},
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": {"layer_names", "kv_cache_spec"},
    "vllm.v1.kv_cache_interface:FullAttentionSpec": {"block_size"},
    "vllm.config:VllmConfig": {
        "kv_transfer_config",
        "parallel_config",
        "cache_config",
        "model_config",
        "kv_events_config",
        "additional_config",
        "scheduler_config",
    },
    "vllm.config:KVEventsConfig": {
        "enable_kv_cache_events",
        "publisher",
        "endpoint",
        "replay_endpoint",
        "topic",
    },
    "vllm.distributed.kv_events:ZmqEventPublisher": {"offset_endpoint_port"},
    "vllm.distributed.kv_events:BlockStored": {
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "medium",
    },
    "vllm.distributed.kv_events:BlockRemoved": {"block_hashes", "medium"},
    "vllm.config:KVTransferConfig": {
        "engine_id",
        "kv_connector",
        "kv_connector_extra_config",
        "kv_load_failure_policy",
    },
    "vllm.config:ParallelConfig": {
        "world_size",
        "rank",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "data_parallel_rank",
    },
    "vllm.config:CacheConfig": {
        "block_size",
        "cache_dtype",
        "num_gpu_blocks",
        "enable_prefix_caching",
        "prefix_caching_hash_algo",
    },
    "vllm.config:ModelConfig": {"model", "revision", "hf_config", "dtype", "quantization"},
    "vllm.lora.request:LoRARequest": {"lora_name", "lora_path"},
    "vllm.multimodal.inputs:MultiModalFeatureSpec": {"identifier", "mm_position"},
    "vllm.multimodal.inputs:PlaceholderRange": {"offset", "length"},
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats": {"data"},
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorRole": {"SCHEDULER"},
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory": {"register_connector"},
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector": {
        "_get_connector_classes_and_configs"
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiKVConnectorMetadata": {
        "metadata",
        "extra_async_saves",
    },
}
MULTI_CONNECTOR = {"_connectors", "_requests_to_connector"}  # of its instances
# Read where they are there, and done without where they are not: some versions have them.
OPTIONAL = {
    "CacheHitSource",
    "HOST",
    "DEFAULT_NONE_HASH_SEED",
    "KVConnectorTransferResults",
    "to_event_extra_keys",
    "failed_recving",
    "hash_block_size",
    "prefix_match_unit",
    "disable_hybrid_kv_cache_manager",
    "prefill_context_parallel_size",
    "data_parallel_index",
    "calculate_kv_scales",
    "kv_cache_report_mode",
}
# Of torch, transformers, prometheus_client and the standard library.
FOREIGN = {
    "to_dict",
    "contiguous",
    "cpu",
    "cuda_stream",
    "current_device",
    "current_stream",
    "numpy",
    "type",
    "inc",
    "debug",
    "exception",
    "info",
    "warning",
    "exists",
}
REQUEST = {
    "request_id",
    "num_tokens",
    "num_computed_tokens",
    "num_preemptions",
    "status",
    "block_hashes",
    "_all_token_ids",
    "mm_features",
    "lora_request",
    "cache_salt",
    "prompt_embeds",
    "skip_reading_prefix_cache",
}
# Of variables with these names all attributes that the sources read must be in the tables above.
VARIABLES = {
    "request": REQUEST,
    "output": FIELDS["vllm.v1.core.sched.output:SchedulerOutput"]
    | FIELDS["vllm.v1.outputs:KVConnectorOutput"],
    "connector_output": FIELDS["vllm.v1.outputs:KVConnectorOutput"],
    "new": FIELDS["vllm.v1.core.sched.output:NewRequestData"],
    "cached": FIELDS["vllm.v1.core.sched.output:CachedRequestData"],
    "lora": FIELDS["vllm.lora.request:LoRARequest"],
    "f": FIELDS["vllm.multimodal.inputs:MultiModalFeatureSpec"],
    "vllm_config": FIELDS["vllm.config:VllmConfig"],
    "parallel": FIELDS["vllm.config:ParallelConfig"],
    "cache": FIELDS["vllm.config:CacheConfig"],
    "model": FIELDS["vllm.config:ModelConfig"],
    "transfer": FIELDS["vllm.config:KVTransferConfig"],
    "events": FIELDS["vllm.config:KVEventsConfig"],
}
OURS = sorted(path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.py"))
# What vLLM's documentation of `KVConnectorBase_V1` says of 0.20 to 0.33 beyond what is installed.
OTHER_VERSIONS = {
    "get_mem_pool_context",
    "finish_forward",
    "reset_capture_state",
    "get_transfer_results",
    "bind_kv_cache_manager",
    "bind_gpu_block_pool",
    "get_loaded_kv_cache_group_ids",
    "get_external_cache_hit_sources",
    "on_new_request",
    "register_finished_partial_tail",
    "has_pending_block_frees",
    "has_pending_push_work",
    "requires_kv_delivery",
    "supports_divergent_local_hybrid_hits",
    "set_xfer_handshake_metadata_pp_aware",
    "restore_kv_caches",
    "unregister_kv_caches",
    "supports_sleep_mode",
    "prefer_cross_layer_blocks",
    "register_cross_layers_kv_cache",
}


def load(path: str) -> Any:
    """Class that a path names, as in "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def names_of(kind: Any) -> set[str]:
    """Attributes of a class, dataclass fields and annotations included."""
    names = set(dir(kind))
    if dataclasses.is_dataclass(kind):
        names |= {field.name for field in dataclasses.fields(kind)}
    for one in kind.__mro__:
        names |= set(getattr(one, "__annotations__", ()))
    return names


@pytest.mark.parametrize("path", FIELDS)
def test_the_fields_that_are_read_exist(path: str) -> None:
    assert FIELDS[path] - names_of(load(path)) == set()


def test_a_request_has_what_is_read_of_it() -> None:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    request = Request("name", [1, 2], SamplingParams(), None, block_hasher=block_hasher("sha256"))
    assert {name for name in REQUEST if not hasattr(request, name)} == set()
    assert isinstance(request.block_hashes, list)
    assert isinstance(request._all_token_ids, list)


def test_a_multi_connector_has_what_is_read_of_it() -> None:
    path = "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector"
    source = inspect.getsource(load(path))
    assert {name for name in MULTI_CONNECTOR if f"self.{name}" not in source} == set()


@pytest.mark.parametrize("file", OURS)
def test_of_variables_that_hold_vllms_objects_only_what_is_listed_is_read(file: str) -> None:
    unlisted = set()
    for node in ast.walk(ast.parse((SOURCES / file).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            listed = VARIABLES.get(node.value.id)
            if listed is not None and node.attr not in listed:
                unlisted.add(f"{node.value.id}.{node.attr}")
    assert unlisted == set()


def names_made_by(paths: Iterable[Path]) -> set[str]:
    """Functions, classes, variables and own attributes of some sources."""
    names: set[str] = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=targets):
                names.update(t.id for t in targets if isinstance(t, ast.Name))
    return names


def names_read(source: str) -> set[str]:
    """Attributes of anything but an imported module of the standard library, also by name."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {a.asname or a.name for node in imports for a in node.names} - {"vllm"}
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module)) if module in modules:
                pass
            case ast.Attribute(attr=name):
                names.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, by_name, *_]):
                if isinstance(by_name, ast.Constant):
                    names.add(str(by_name.value))
    return {name for name in names if not name.startswith("__")}


@pytest.fixture(scope="module")
def familiar() -> set[str]:
    """Every name that may be read: listed above, kvbm's own, or of Python's own types."""
    listed = set().union(*FIELDS.values(), REQUEST, MULTI_CONNECTOR, OPTIONAL, FOREIGN)
    package = SOURCES.parent
    made = names_made_by([*package.rglob("*.py"), *package.rglob("*.pyi")])
    types: tuple[type, ...] = (str, bytes, list, dict, set, tuple, property)
    return listed.union(made, *map(dir, types))


@pytest.mark.parametrize("file", OURS)
def test_nothing_is_read_by_a_name_that_is_not_listed(file: str, familiar: set[str]) -> None:
    """Whatever the variable is called: a name that is not kvbm's own must be in the lists above."""
    assert names_read((SOURCES / file).read_text()) - familiar == set()


@pytest.mark.parametrize(
    "source",
    [
        "known.request.sampling_params",
        "getattr(x, 'priority_of_vllm', 0)",
        "a().kv_zone",
        "vllm.zones",
    ],
)
def test_a_name_that_is_not_listed_is_seen(source: str, familiar: set[str]) -> None:
    assert names_read(source) - familiar != set()


def test_version_checks_are_in_one_place() -> None:
    for path in SOURCES.rglob("*.py"):
        if path.name not in ("compat.py", "engine.py"):  # the latter for the fingerprint
            assert "__version__" not in path.read_text(), path


def test_the_failure_policy_is_read_after_the_connector_was_made() -> None:
    source = inspect.getsource(load("vllm.v1.core.sched.scheduler:Scheduler").__init__)
    made, read = (source.index(w) for w in ("create_connector(", "kv_load_failure_policy"))
    assert made < read


def test_the_publisher_of_events_is_made_after_the_connector() -> None:
    source = inspect.getsource(load("vllm.v1.core.sched.scheduler:Scheduler").__init__)
    connector, publisher = (
        source.index(w) for w in ("create_connector(", "EventPublisherFactory.create(")
    )
    assert connector < publisher


def test_hashes_are_those_of_whole_blocks() -> None:
    assert compat.group_count(None) == 1
    config = cache_configuration()
    assert compat.hash_block_tokens(None, config, 16) == 16  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.32.0", (0, 32)), ("0.9.1+cpu", (0, 9)), ("1.0rc1", (1, 0)), ("dev", (0, 0))],
)
def test_versions_are_read_from_their_text(text: str, expected: tuple[int, int]) -> None:
    assert compat.parse_version(text) == expected


def documented() -> set[str]:
    """Methods in the table of the documentation."""
    text = DOCUMENT.read_text().partition("## vLLM's methods")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"SupportsHMA"}


def public(kind: type) -> set[str]:
    """Public names that a class defines itself."""
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_documentation_answers_every_method_of_vllm() -> None:
    methods = public(base.KVConnectorBase_V1) | public(base.SupportsHMA)
    assert methods - documented() == set()
    assert documented() - methods - OTHER_VERSIONS == set()


def test_the_documentation_says_which_methods_are_inherited() -> None:
    text = DOCUMENT.read_text().partition("## vLLM's methods")[2].partition("\n## ")[0]
    own = public(DynamoConnector)
    for line in text.splitlines():
        if not line.startswith("| `"):
            continue
        _, names, _, answer, *_ = line.split("|")
        for name in set(re.findall(r"`(\w+)`", names)) - {"SupportsHMA"}:
            inherited = answer.strip().startswith(("Inherited", "Not offered"))
            assert inherited == (name not in own), name
