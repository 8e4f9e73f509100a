# SPDX-License-Identifier: Apache-2.0
"""Connectors that vLLM loads by class name."""

from importlib import import_module
from typing import TYPE_CHECKING

from kvbm.vllm_integration.connector.dynamo_connector import (
    DynamoConnector,
    DynamoConnectorMetadata,
)

if TYPE_CHECKING:
    from kvbm.vllm_integration.connector.pd_connector import PdConnector, PdConnectorMetadata

__all__ = ["DynamoConnector", "DynamoConnectorMetadata", "PdConnector", "PdConnectorMetadata"]


def __getattr__(name: str) -> object:
    # Every process of an engine imports this package; few need vLLM's MultiConnector.
    if name not in ("PdConnector", "PdConnectorMetadata"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("kvbm.vllm_integration.connector.pd_connector"), name)
