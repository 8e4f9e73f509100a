# SPDX-License-Identifier: Apache-2.0
"""`PdConnector`: prefill workers of a disaggregated engine, with a cache beside the transfer.

Two child connectors, in this order: the cache, which is asked for hits (`DynamoConnector`, or one
of the two others that upstream allows), and `NixlConnector`, which hands the finished prefill over
to the decode worker::

    {"kv_connector": "PdConnector", "kv_role": "kv_both",
     "kv_connector_module_path": "kvbm.vllm_integration.connector",
     "kv_connector_extra_config": {"connectors": [
        {"kv_connector": "DynamoConnector", "kv_role": "kv_both",
         "kv_connector_module_path": "kvbm.vllm_integration.connector"},
        {"kv_connector": "NixlConnector", "kv_role": "kv_both"}]}}

Everything but the question for hits is vLLM's own `MultiConnector`, whatever the version's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, supports_hma
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiConnector,
    MultiKVConnectorMetadata,
)

from kvbm.errors import ConfigError
from kvbm.vllm_integration.connector.dynamo_connector import DynamoConnector
from kvbm.vllm_integration.engine import apply_load_failure_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["PdConnector", "PdConnectorMetadata"]

CACHE_CONNECTORS = ("DynamoConnector", "LMCacheConnectorV1", "FlexKVConnectorV1")
TRANSFER_CONNECTOR = "NixlConnector"
HANDSHAKE = "NixlHandshakePayload"


@dataclass
class PdConnectorMetadata(MultiKVConnectorMetadata):
    """One step's message: the cache's and the transfer's."""


def _check_children(vllm_config: VllmConfig) -> None:
    transfer = vllm_config.kv_transfer_config
    children = transfer.kv_connector_extra_config.get("connectors")
    names = [child.get("kv_connector") for child in children or ()]
    if len(names) != 2:
        raise ValueError(
            f"PdConnector: kv_connector_extra_config['connectors'] has {len(names)} connectors "
            f"{names}; needed are two: one of {', '.join(CACHE_CONNECTORS)}, then "
            f"{TRANSFER_CONNECTOR}"
        )
    if names[0] not in CACHE_CONNECTORS:
        raise TypeError(
            f"PdConnector: the first connector is {names[0]!r}; allowed are "
            f"{', '.join(CACHE_CONNECTORS)}"
        )
    if names[1] != TRANSFER_CONNECTOR:
        raise TypeError(
            f"PdConnector: the second connector is {names[1]!r}; allowed is {TRANSFER_CONNECTOR}"
        )


class PdConnector(MultiConnector):
    """A cache and a transfer to the decode worker, at once.

    Parameters
    ----------
    vllm_config : VllmConfig
        Must have a `kv_transfer_config` with the two connectors.
    role : KVConnectorRole
        SCHEDULER or WORKER.
    kv_cache_config : KVCacheConfig, optional
        Groups and number of blocks.

    Raises
    ------
    ValueError
        There are not two connectors.
    TypeError
        One of them is of another kind.
    ConfigError
        vLLM's hybrid KV-cache manager is on and a child does not support it.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None = None,
    ) -> None:
        _check_children(vllm_config)
        self._check_hybrid(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        child = self._connectors[0]
        if role == KVConnectorRole.SCHEDULER and isinstance(child, DynamoConnector):
            # The child has a configuration of its own; the scheduler reads the engine's.
            apply_load_failure_policy(vllm_config, child.settings)

    @classmethod
    def _check_hybrid(cls, vllm_config: VllmConfig) -> None:
        """Say what to pass where vLLM would only assert: it believes that this class can do it."""
        if getattr(vllm_config.scheduler_config, "disable_hybrid_kv_cache_manager", True):
            return
        pairs = cls._get_connector_classes_and_configs(vllm_config)
        without = [child.__name__ for child, _ in pairs if not supports_hma(child)]
        if without:
            raise ConfigError(
                f"disable_hybrid_kv_cache_manager=False is not supported with {', '.join(without)} "
                "in PdConnector: pass --disable-hybrid-kv-cache-manager"
            )

    # ---- scheduler side ------------------------------------------------------------------------
    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that the cache can load; the transfer is not asked, it only sends."""
        tokens, load_async = self._connectors[0].get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        if tokens:
            self._requests_to_connector[request.request_id] = 0
        else:  # of an earlier question, when there was a hit
            self._requests_to_connector.pop(request.request_id, None)
        return tokens, load_async

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PdConnectorMetadata:
        """End of a scheduling step: both messages."""
        both = super().build_connector_meta(scheduler_output)
        return PdConnectorMetadata(both.metadata, both.extra_async_saves)

    # ---- worker side ---------------------------------------------------------------------------
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the transfer announces to decode workers.

        Raises
        ------
        TypeError
            It is of another kind than `NixlHandshakePayload`.
        """
        metadata = self._connectors[1].get_handshake_metadata()
        if metadata is not None and HANDSHAKE not in {c.__name__ for c in type(metadata).__mro__}:
            raise TypeError(
                f"PdConnector: the handshake is a {type(metadata).__name__}; needed is {HANDSHAKE}"
            )
        return metadata
