# SPDX-License-Identifier: Apache-2.0
"""The two classes that TensorRT-LLM loads by name; importing them needs TensorRT-LLM."""

from kvbm.trtllm_integration.connector.kvbm_connector_leader import DynamoKVBMConnectorLeader
from kvbm.trtllm_integration.connector.kvbm_connector_worker import DynamoKVBMConnectorWorker

__all__ = ["DynamoKVBMConnectorLeader", "DynamoKVBMConnectorWorker"]
