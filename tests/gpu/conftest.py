# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.vllm_lab.engine import stop_server, vllm_build
from tests.e2e.lab import Lab
from tests.fast.conftest import make_instance
from tests.gpu.memory import torch_with_cuda

__all__ = ["lab", "make_instance"]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Real engines on the device; steps of up to 32 tokens are graphs."""
    if vllm_build() is None:
        pytest.skip("vLLM is not installed")
    torch_with_cuda()
    yield Lab(tmp_path_factory.mktemp("lab"), device="cuda", cuda_graphs=True)
    stop_server()
