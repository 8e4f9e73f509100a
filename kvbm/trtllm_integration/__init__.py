# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM integration, under upstream's module paths.

TensorRT-LLM loads the connector by name: `kv_connector_config: {connector_module:
kvbm.trtllm_integration.connector, connector_scheduler_class: DynamoKVBMConnectorLeader,
connector_worker_class: DynamoKVBMConnectorWorker}`, or, where it has presets, `connector: kvbm`.
"""
