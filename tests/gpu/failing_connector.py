# SPDX-License-Identifier: Apache-2.0
"""The connector over a driver that fails on request: a module path for ``kv_transfer_config``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvbm.transfer.backends import Device
from kvbm.vllm_integration import connector_worker
from kvbm.vllm_integration.connector import DynamoConnector, DynamoConnectorMetadata
from tests.gpu.failing_driver import library

__all__ = ["DynamoConnector", "DynamoConnectorMetadata"]

_real_device_of = connector_worker.device_of


def device_of(kv_caches: dict[str, Any]) -> Device:
    """Return the same device, through the other driver."""
    return replace(_real_device_of(kv_caches), library=str(library()))


connector_worker.device_of = device_of
