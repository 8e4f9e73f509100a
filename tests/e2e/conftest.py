# SPDX-License-Identifier: Apache-2.0
"""The engines of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.vllm_lab.engine import stop_server, vllm_build
from tests.e2e.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Real engines, where vLLM is installed."""
    if vllm_build() is None:
        pytest.skip("vLLM is not installed")
    yield Lab(tmp_path_factory.mktemp("lab"))
    stop_server()
