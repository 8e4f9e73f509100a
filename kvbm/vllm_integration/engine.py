# SPDX-License-Identifier: Apache-2.0
"""What both sides of the connector read from vLLM's configuration."""

import logging
import uuid
from typing import TYPE_CHECKING, Any

import vllm

from kvbm.config import Settings, load_settings
from kvbm.errors import ConfigError
from kvbm.fingerprint import config_version, weights_version
from kvbm.instance import private_instance

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

HYBRID_HELP = (
    "pass --disable-hybrid-kv-cache-manager (LLM(disable_hybrid_kv_cache_manager=True)) to keep "
    "all layers as full attention, or run this model without the connector"
)


def settings_of(vllm_config: "VllmConfig") -> Settings:
    """Settings from the connector's extra configuration and the environment."""
    extra = getattr(vllm_config.kv_transfer_config, "kv_connector_extra_config", None)
    return load_settings(extra)


def instance_of(vllm_config: "VllmConfig", settings: Settings) -> str:
    """Instance name: the one that was given, or one of this engine alone."""
    return settings.instance or private_instance(str(vllm_config.kv_transfer_config.engine_id))


def apply_load_failure_policy(vllm_config: "VllmConfig", settings: Settings) -> None:
    """Have the scheduler, which reads it later, follow the policy of kvbm's settings.

    vLLM's own default is to fail the request, and it cannot be told from a wish of the user.
    """
    transfer, policy = vllm_config.kv_transfer_config, settings.load_failure_policy
    if getattr(transfer, "kv_load_failure_policy", policy) != policy:
        logger.info(
            "kv_load_failure_policy is set to %s (DYN_KVBM_LOAD_FAILURE_POLICY): %s",
            policy,
            "what cannot be loaded is recomputed"
            if policy == "recompute"
            else "a request whose load fails ends with an error",
        )
        transfer.kv_load_failure_policy = policy


def block_tokens_of(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig | None") -> int:
    """Tokens in a block of the scheduler."""
    if kv_cache_config is not None and kv_cache_config.kv_cache_groups:
        return int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
    return int(vllm_config.cache_config.block_size)


def check_model(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig | None") -> int:
    """Refuse what is not supported; returns the number of KV-cache groups.

    All groups must be full attention with blocks of one size: then a block of each group holds the
    same tokens.

    Raises
    ------
    ConfigError
        The message says what to pass.
    """
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size != 1:
            raise ConfigError(f"{name}={size} is not supported with this connector: allowed is 1")
    if kv_cache_config is None:
        return 1
    kinds = {type(g.kv_cache_spec).__name__ for g in kv_cache_config.kv_cache_groups}
    sizes = {int(g.kv_cache_spec.block_size) for g in kv_cache_config.kv_cache_groups}
    others = sorted(kind for kind in kinds if not _is_full_attention(kind))
    if others or len(sizes) > 1:
        raise ConfigError(
            f"KV-cache groups of kind {', '.join(others) or 'full attention'} with block sizes "
            f"{sorted(sizes)} are not supported: all groups must be full attention with one block "
            f"size; {HYBRID_HELP}"
        )
    return max(1, len(kv_cache_config.kv_cache_groups))


def _is_full_attention(kind: str) -> bool:
    # UniformTypeKVCacheSpecs holds layers of one type whose blocks differ in size; MLA is full
    # attention, too.
    return kind in {"FullAttentionSpec", "MLAAttentionSpec", "UniformTypeKVCacheSpecs"}


def fingerprint_values(vllm_config: "VllmConfig", block_tokens: int) -> dict[str, Any]:
    """What of vLLM's configuration decides whether KV bytes can be reused."""
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    config = getattr(model, "hf_config", None)
    # Scales that an engine computes from its own first input: its bytes mean nothing to another.
    computed = getattr(cache, "calculate_kv_scales", False)
    return {
        "engine": f"vllm {vllm.__version__}",
        "model": str(model.model),
        "weights": weights_version(str(model.model), getattr(model, "revision", None)),
        "config": config_version(None if config is None else config.to_dict()),
        "dtype": str(model.dtype),
        "quantization": str(getattr(model, "quantization", None)),
        "cache_dtype": str(cache.cache_dtype),
        "kv_scales": f"computed {uuid.uuid4().hex}" if computed else "loaded",
        "block_tokens": block_tokens,
        "tensor_parallel": int(parallel.tensor_parallel_size),
        "pipeline_parallel": int(parallel.pipeline_parallel_size),
        "hash_algorithm": str(cache.prefix_caching_hash_algo),
    }
