# SPDX-License-Identifier: Apache-2.0
"""Names under which upstream's binary classes are imported: there, or None, never an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
from kvbm.vllm_integration import rust
import kvbm
print([name for name in rust.__all__ if getattr(rust, name) is not None])
print(rust.BlockManager is kvbm.BlockManager)
"""


def test_without_vllm_the_names_that_need_it_are_none() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VLLM], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "['BlockManager']\nTrue\n", done.stderr
    assert "vLLM is not available" in done.stderr


def test_the_names_are_upstreams() -> None:
    from kvbm.vllm_integration import rust

    assert set(rust.__all__) == {
        "BlockManager", "BlockState", "BlockStates", "KvConnectorLeader", "KvConnectorWorker",
        "KvbmBlockList", "KvbmCacheManager", "KvbmRequest", "SchedulerOutput", "SlotUpdate",
    }  # fmt: skip
    assert all(hasattr(rust, name) for name in rust.__all__)


def test_the_binary_modules_names_that_mean_something_are_there() -> None:
    import kvbm
    from kvbm import _core

    assert _core.BlockManager is kvbm.BlockManager
    assert _core.KvbmLeader is kvbm.KvbmLeader
    assert _core.KvbmWorker is kvbm.KvbmWorker
    assert all(hasattr(_core, name) for name in _core.__all__)
