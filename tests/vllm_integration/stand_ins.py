# SPDX-License-Identifier: Apache-2.0
"""Connectors for vLLM that stand in for others, loaded by module path under their names.

`NixlConnector` transfers nothing: it holds each finished request until the worker has seen its id,
as the real one does until the decode worker has read its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)


@dataclass
class Message(KVConnectorMetadata):
    """One step's message, with the name of who made it."""

    sender: str = ""


@dataclass
class NixlHandshakePayload(KVConnectorHandshakeMetadata):
    """What a worker announces."""

    text: str = "here"


class Recorder(KVConnectorBase_V1):
    """Writes down the calls that it gets, as (name, arguments)."""

    answer: tuple[int | None, bool] = (0, False)
    hold = False

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.calls: list[tuple[Any, ...]] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        self.calls.append(("match", request.request_id, num_computed_tokens))
        return self.answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.calls.append(("allocated", request.request_id, num_external_tokens))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return Message(type(self).__name__)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict | None]:
        return self.hold, {"remote_engine_id": "engine"} if self.hold else None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return (finished_req_ids or None) if self.hold else None, None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.calls.append(("bind", getattr(connector_metadata, "sender", "")))

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        self.calls.append(("handshake", metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass


class LMCacheConnectorV1(Recorder):
    """Stands in for a cache."""


class NixlConnector(Recorder):
    """Stands in for the transfer."""

    hold = True

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return NixlHandshakePayload()
