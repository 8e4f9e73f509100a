# SPDX-License-Identifier: Apache-2.0
"""vLLM integration, under upstream's module paths.

vLLM loads the connector by name:
`{"kv_connector": "DynamoConnector", "kv_role": "kv_both",
"kv_connector_module_path": "kvbm.vllm_integration.connector"}`.

The connectors' classes are also attributes of this package, and so are upstream's aliases
`dynamo_connector` and `pd_connector`; they are imported, with vLLM, when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbm.vllm_integration.connector import (
        DynamoConnector,
        DynamoConnectorMetadata,
        PdConnector,
        PdConnectorMetadata,
    )

    dynamo_connector = DynamoConnector
    pd_connector = PdConnector

__all__ = [
    "DynamoConnector",
    "DynamoConnectorMetadata",
    "PdConnector",
    "PdConnectorMetadata",
    "dynamo_connector",
    "pd_connector",
]

_ALIASES = {"dynamo_connector": "DynamoConnector", "pd_connector": "PdConnector"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    connector = import_module("kvbm.vllm_integration.connector")
    return getattr(connector, _ALIASES.get(name, name))
