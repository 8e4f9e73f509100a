# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's connector interface as far as kvbm uses it, recorded, and a module that has it.

Recorded from NVIDIA/TensorRT-LLM's `kv_cache_connector.py`:

======  ==================================  ======================================================
here    module                              commit, and what is of that time
======  ==================================  ======================================================
1.2     ..pyexecutor.kv_cache_connector     00fdcbff5ad82a6438b3e0c9dbc5480b6ee52bdc
1.3     ..pyexecutor.connectors.            035ab91cad04b7b77a479a9526edecfbc742c661: salt texts,
        kv_cache_connector                  layer groups, a second cache manager
======  ==================================  ======================================================

Between them (5a06f334f04fb515ff79f73b7f0f7726ad757361) the module had moved, priorities were there
and a salt was a number. Requests are read by the names of the C++ bindings
(cpp/tensorrt_llm/nanobind/batch_manager/bindings.cpp).
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MODULES = {
    "1.2": "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
    "1.3": "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
}
VERSIONS = {"1.2": "1.2.0rc2", "1.3": "1.3.0rc29"}

REQUEST_DATA = {
    "1.2": ["request_id", "new_tokens", "new_block_ids", "computed_position",
            "num_scheduled_tokens"],
    "1.3": ["request_id", "new_tokens", "new_block_ids", "computed_position",
            "num_scheduled_tokens", "block_hashes", "priorities", "cache_salt",
            "new_block_ids_by_layer_group"],
}  # fmt: skip
SCHEDULER_OUTPUT = {
    "1.2": ["new_requests", "cached_requests"],
    "1.3": ["new_requests", "cached_requests", "attention_dp_rank"],
}

# Methods that must be there, and their arguments after `self`.
SCHEDULER_METHODS = {
    "build_connector_meta": ["scheduler_output"],
    "get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "request_finished": ["request", "cache_block_ids"],
    "update_state_after_alloc": ["request", "block_ids"],
}
WORKER_METHODS = {
    "register_kv_caches": ["kv_cache_tensor"],
    "start_load_kv": ["stream"],
    "wait_for_layer_load": ["layer_idx", "stream"],
    "save_kv_layer": ["layer_idx", "stream"],
    "wait_for_save": ["stream"],
    "get_finished": ["finished_gen_req_ids", "started_loading_req_ids"],
}
# Those that have a default of TensorRT-LLM's.
SCHEDULER_DEFAULTS = {
    "1.2": {},
    "1.3": {
        "wait_for_initialization": [],
        "request_finished_by_layer_group": ["request", "cache_block_ids_by_layer_group"],
        "update_state_after_alloc_by_layer_group": ["request", "block_ids_by_layer_group"],
    },
}
WORKER_DEFAULTS = {
    "1.2": {
        "bind_connector_meta": ["metadata"],
        "get_connector_meta": [],
        "register_forward_pass_callable": [],
    },
    "1.3": {
        "bind_connector_meta": ["metadata"],
        "get_connector_meta": [],
        "register_forward_pass_callable": [],
        "register_kv_cache_layout": ["layout"],
    },
}
# What is read of a request: names of the C++ bindings, and one of the Python class above them
# (llm_request.py), which a look-up does not get.
REQUEST = {
    "request_id", "get_tokens", "context_current_position", "lora_task_id", "cache_salt",
    "cache_salt_id", "multimodal_hashes", "multimodal_positions", "multimodal_embedding",
    "prompt_embedding_table", "return_context_logits", "is_dummy_request", "is_finished",
    "is_generation_complete_state", "py_multimodal_data",
}  # fmt: skip
# What is read of the arguments (llmapi/llm_args.py), of `parallel_config.to_mapping()` and of
# `kv_cache_config`; all of it has a default there.
ARGUMENTS = {
    "parallel_config", "kv_cache_config", "model", "revision", "model_kwargs", "dtype",
    "quant_config", "attn_backend", "speculative_config", "sparse_attention_config",
    "max_beam_width", "max_seq_len", "enable_attention_dp",
}  # fmt: skip
MAPPING = {"to_mapping", "world_size", "rank", "tp_size", "pp_size", "cp_size"}
CACHE_CONFIG = {
    "tokens_per_block", "dtype", "host_cache_size", "max_attention_window", "kv_cache_quant_algo",
    "enable_block_reuse",
}  # fmt: skip


def _abstract(arguments: list[str]) -> Any:
    names = ", ".join(["self", *arguments])
    scope: dict[str, Any] = {}
    exec(f"def method({names}): raise NotImplementedError", scope)
    return abc.abstractmethod(scope["method"])


def _base(name: str, methods: dict[str, list[str]], default: types.FunctionType | None) -> type:
    def init(self: Any, llm_args: Any) -> None:
        self._llm_args, self._metadata = llm_args, None

    members: dict[str, Any] = {method: _abstract(names) for method, names in methods.items()}
    members["__init__"] = init
    if default is not None:
        members["bind_connector_meta"] = default
    return abc.ABCMeta(name, (), members)


def _bind(self: Any, metadata: object) -> None:
    self._metadata = metadata


def interface(version: str) -> types.ModuleType:
    """A module with the classes of one version's interface."""
    module = types.ModuleType(MODULES[version])
    for name, fields in (
        ("RequestData", REQUEST_DATA[version]),
        ("SchedulerOutput", SCHEDULER_OUTPUT[version]),
    ):
        setattr(module, name, dataclasses.make_dataclass(name, fields))
    module.KvCacheConnectorScheduler = _base(  # type: ignore[attr-defined]
        "KvCacheConnectorScheduler", SCHEDULER_METHODS, None
    )
    module.KvCacheConnectorWorker = _base(  # type: ignore[attr-defined]
        "KvCacheConnectorWorker", WORKER_METHODS, _bind
    )
    return module


@contextmanager
def installed(version: str = "1.3") -> Iterator[types.ModuleType]:
    """Make `import tensorrt_llm` find a module that has the interface, and nothing else.

    What kvbm has imported with it goes with it.
    """
    made: dict[str, types.ModuleType] = {}
    found = interface(version)
    parts = MODULES[version].split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        made[name] = types.ModuleType(name)
        made[name].__path__ = []  # type: ignore[attr-defined]
    made[MODULES[version]] = found
    utils = types.ModuleType("tensorrt_llm._utils")
    utils.mpi_broadcast = lambda value, root=0: value  # type: ignore[attr-defined]
    made[utils.__name__] = utils
    made["tensorrt_llm"].__version__ = VERSIONS[version]  # type: ignore[attr-defined]
    for name, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    _forget_kvbm()
    try:
        yield found
    finally:
        for name in made:
            del sys.modules[name]
        _forget_kvbm()


def _forget_kvbm() -> None:
    for name in [name for name in sys.modules if name.startswith("kvbm.trtllm_integration")]:
        del sys.modules[name]
