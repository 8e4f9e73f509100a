# SPDX-License-Identifier: Apache-2.0
"""vLLM integration, under upstream's module paths.

vLLM loads the connector by name:
`{"kv_connector": "DynamoConnector", "kv_role": "kv_both",
"kv_connector_module_path": "kvbm.vllm_integration.connector"}`.
"""
