# SPDX-License-Identifier: Apache-2.0
"""The bytes of events that the tests know are those of the installed vLLM."""

from __future__ import annotations

import pytest
import vllm
from vllm.distributed import kv_events

from tests.events.vllm_batches import batch_of, golden

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds


def test_the_installed_vllm_writes_the_bytes_of_its_minor_version() -> None:
    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in golden():
        pytest.skip(f"no bytes are known of vLLM {version}")
    assert batch_of(kv_events) == golden()[version]
