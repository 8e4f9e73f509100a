# SPDX-License-Identifier: Apache-2.0
"""Everything that differs between the vLLM versions that are supported, 0.20 to 0.33.

What can be told from vLLM itself (does it have that name?) is; only where nothing tells, the
version number decides. Methods and arguments that a version does not know are harmless, so the
connector has those of all versions.
"""

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base as connector_base
from vllm.v1.core import kv_cache_utils

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

OLDEST = (0, 20)
NEWEST = (0, 33)
"""Minor versions that this file was written for."""


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor number of a version, (0, 0) if it has none (a build from a checkout)."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


VERSION = parse_version(str(vllm.__version__))

HASH_SEED: str | None = getattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", None)
"""0.29: block hashes are the same in every process. Before: seeded at random in each."""

HASHES_NEED_IDENTITY = not hasattr(kv_cache_utils, "to_event_extra_keys")
"""Before 0.31, block hashes do not tell a LoRA adapter from a cache salt of the same text."""

STATS_NEED_A_WORKER = (0, 0) < VERSION < (0, 24)
"""Before 0.24, the scheduler side's statistics are asked for only if a worker has given some.

And before the step's finished requests are told: no later step may follow one that reports nothing.
"""

STATS_GET_LOST = (0, 0) < VERSION < (0, 28)
"""Before 0.28, statistics of a step without output do not reach the front end of an LLM object."""


def host_hit_source() -> Any:
    """0.32: what prefix-cache hits from host memory are called in vLLM's metrics; None before."""
    source = getattr(connector_base, "CacheHitSource", None)
    return None if source is None else source.HOST


def transfer_results(sent: Iterable[str], received: Iterable[str], failed: Iterable[str]) -> Any:
    """0.30: a `KVConnectorTransferResults`.

    Before, nobody asks for it, and failures are told as device blocks only.
    """
    return connector_base.KVConnectorTransferResults(
        finished_sending=set(sent), finished_recving=set(received), failed_recving=set(failed)
    )


def group_count(kv_cache_config: "KVCacheConfig | None") -> int:
    """KV-cache groups; 0.20 may give no configuration, and then has one."""
    return 1 if kv_cache_config is None else max(1, len(kv_cache_config.kv_cache_groups))


def hash_block_tokens(
    vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig | None", block_tokens: int
) -> int:
    """Tokens of one of the engine's block hashes.

    0.31 and later say it; before, it is that of a block, but for several groups with an override
    (`hash_block_size`, from 0.21 `prefix_match_unit`).
    """
    said = getattr(kv_cache_config, "hash_block_size", None)
    if not said and group_count(kv_cache_config) > 1:
        cache = vllm_config.cache_config
        said = getattr(cache, "prefix_match_unit", None) or getattr(cache, "hash_block_size", None)
    return int(said or block_tokens)


def not_loaded(output: "KVConnectorOutput") -> Iterable[int]:
    """Device blocks that a worker has reported as not loaded."""
    return output.invalid_block_ids or ()


def failed_loads(output: "KVConnectorOutput") -> Collection[str]:
    """0.30: requests that a worker has reported as not loaded at all."""
    return getattr(output, "failed_recving", None) or ()


def reports_reuse(request: "Request") -> bool:
    """Whether vLLM's events also tell of the blocks that the request finds on the device."""
    return getattr(request, "kv_cache_report_mode", "incremental") == "full"
