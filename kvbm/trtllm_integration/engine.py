# SPDX-License-Identifier: Apache-2.0
"""What both sides of the connector read from TensorRT-LLM's arguments."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbm.config import Settings, load_settings
from kvbm.errors import ConfigError, GeometryError
from kvbm.fingerprint import config_version, weights_version
from kvbm.instance import private_instance
from kvbm.leader.opening import EnginePlace
from kvbm.trtllm_integration import compat

logger = logging.getLogger(__name__)

POOL_AXES = 4
"""TensorRT-LLM's pool: blocks, layers, keys and values (one where they are one), the rest."""

MLA_TOKENS = 64
"""Tokens of a block where TensorRT-LLM uses FlashMLA; it tells connectors what was configured."""

_lock = threading.Lock()
_engine_ids: dict[int, tuple[Any, str]] = {}


def settings_of() -> Settings:
    """Settings from the environment: TensorRT-LLM's connector configuration has no place for any.

    Raises
    ------
    ConfigError
        A setting is wrong, or no tier is configured.
    """
    settings = load_settings()
    settings.require_a_tier()
    return settings


def own_engine_id(llm_args: Any) -> str:
    """Name of the engine that these arguments make; one process's two sides get the same object."""
    with _lock:
        known = _engine_ids.get(id(llm_args))
        if known is None:
            # The arguments are kept, so that no others get their identity.
            known = llm_args, f"trtllm-{os.getpid()}-{uuid.uuid4().hex}"
            _engine_ids[id(llm_args)] = known
        return known[1]


def engine_place(llm_args: Any, settings: Settings, engine_id: str) -> EnginePlace:
    """Which engine it is, and of what its cache is made."""
    return EnginePlace(
        settings.instance or private_instance(engine_id),
        engine_id,
        int(llm_args.parallel_config.to_mapping().world_size),
        int(llm_args.kv_cache_config.tokens_per_block),
    )


def check_engine(llm_args: Any) -> None:
    """Refuse what would put other bytes into a block than those that are copied.

    Newer versions of TensorRT-LLM refuse most of it themselves.

    Raises
    ------
    ConfigError
        The message says what to change.
    """
    mapping = llm_args.parallel_config.to_mapping()
    cache = llm_args.kv_cache_config
    refused = {
        f"pp_size={mapping.pp_size}": mapping.pp_size != 1,
        f"cp_size={mapping.cp_size}": mapping.cp_size != 1,
        "enable_attention_dp: ranks have requests of their own": _flag(llm_args, "attention_dp"),
        f"max_beam_width={_beams(llm_args)}": _beams(llm_args) > 1,
        "kv_cache_config.host_cache_size: TensorRT-LLM's own host tier moves blocks under the "
        "connector; set it to 0": bool(getattr(cache, "host_cache_size", None)),
        "kv_cache_config.max_attention_window: blocks behind a sliding window are overwritten": (
            _slides(llm_args)
        ),
        "attn_backend VANILLA: its blocks are as long as a batch": (
            getattr(llm_args, "attn_backend", None) == "VANILLA"
        ),
        "sparse_attention_config: its index cache is not registered with connectors": (
            getattr(llm_args, "sparse_attention_config", None) is not None
        ),
        f"a 4-bit KV cache ({_cache_type(llm_args)}): its scales are not registered with "
        "connectors": "fp4" in _cache_type(llm_args).lower(),
    }
    problems = [what for what, wrong in refused.items() if wrong]
    if problems:
        raise ConfigError(f"not supported with this connector: {'; '.join(problems)}")


def _flag(llm_args: Any, what: str) -> bool:
    return bool(getattr(llm_args, f"enable_{what}", False))


def _beams(llm_args: Any) -> int:
    return int(getattr(llm_args, "max_beam_width", None) or 1)


def _cache_type(llm_args: Any) -> str:
    quantization = getattr(llm_args, "quant_config", None)
    algorithm = getattr(quantization, "kv_cache_quant_algo", None)
    return f"{getattr(llm_args.kv_cache_config, 'dtype', 'auto')}, {algorithm}"


def _slides(llm_args: Any) -> bool:
    windows = getattr(llm_args.kv_cache_config, "max_attention_window", None) or ()
    longest = getattr(llm_args, "max_seq_len", None)
    return any(longest is None or window < longest for window in windows)


def check_pool(llm_args: Any, shape: Sequence[int]) -> None:
    """Refuse a KV pool that is not understood, or whose blocks may have other tokens than is said.

    Raises
    ------
    GeometryError
        It does not have TensorRT-LLM's axes.
    ConfigError
        The message says what to change.
    """
    if len(shape) != POOL_AXES or shape[2] not in (1, 2):
        raise GeometryError(
            f"KV pool of shape {tuple(shape)} is not understood: it has blocks, layers, 1 or 2, "
            "elements"
        )
    tokens = int(llm_args.kv_cache_config.tokens_per_block)
    if shape[2] == 1 and tokens != MLA_TOKENS:
        raise ConfigError(
            f"kv_cache_config.tokens_per_block={tokens} is not supported for this model: with MLA, "
            f"TensorRT-LLM may use blocks of {MLA_TOKENS} tokens whatever is set; set {MLA_TOKENS}"
        )


def fingerprint_values(llm_args: Any) -> dict[str, Any]:
    """What of TensorRT-LLM's arguments decides whether KV bytes can be reused."""
    mapping = llm_args.parallel_config.to_mapping()
    model = str(llm_args.model)
    return {
        "engine": f"tensorrt_llm {compat.VERSION}",
        "model": model,
        "weights": weights_version(model, getattr(llm_args, "revision", None)),
        "config": config_version(_model_config(model)),
        "overrides": str(getattr(llm_args, "model_kwargs", None)),
        "dtype": str(getattr(llm_args, "dtype", None)),
        "quantization": str(getattr(llm_args, "quant_config", None)),
        "cache_dtype": str(getattr(llm_args.kv_cache_config, "dtype", None)),
        "attention": str(getattr(llm_args, "attn_backend", None)),
        "speculation": str(getattr(llm_args, "speculative_config", None)),
        "block_tokens": int(llm_args.kv_cache_config.tokens_per_block),
        "tensor_parallel": int(mapping.tp_size),
        "hashes": "kvbm",
        "groups": 1,
    }


def _model_config(model: str) -> dict[str, Any] | None:
    """Return what the model's folder says about it; None for a name on a hub."""
    try:
        found = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
