# SPDX-License-Identifier: Apache-2.0
"""Connectors that vLLM loads by class name."""

from kvbm.vllm_integration.connector.dynamo_connector import (
    DynamoConnector,
    DynamoConnectorMetadata,
)

__all__ = ["DynamoConnector", "DynamoConnectorMetadata"]
