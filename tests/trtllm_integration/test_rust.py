# SPDX-License-Identifier: Apache-2.0
"""Without TensorRT-LLM: names are there or None, modules import, and a class says what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys
sys.modules["tensorrt_llm"] = None
import kvbm, kvbm.trtllm_integration
from kvbm.trtllm_integration import consolidator_config, rust
print([name for name in rust.__all__ if getattr(rust, name) is not None])
print(consolidator_config.get_consolidator_endpoints())
try:
    import kvbm.trtllm_integration.connector
except ImportError as error:
    print("tensorrt_llm" in str(error))
"""


def test_without_tensorrt_llm_the_names_that_need_it_are_none() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "[]", done.stderr
    assert lines[1:] == [
        "('tcp://*:56001', 'tcp://0.0.0.0:57001', 'tcp://127.0.0.1:57001')",
        "True",
    ]
    assert "TensorRT-LLM is not available" in done.stderr


def test_the_names_are_upstreams(interface: Any) -> None:
    from kvbm.trtllm_integration import rust

    assert set(rust.__all__) == {
        "BlockState", "BlockStates", "KvConnectorLeader", "KvConnectorWorker", "KvbmBlockList",
        "KvbmRequest", "SchedulerOutput", "SlotUpdate",
    }  # fmt: skip
    there = {name for name in rust.__all__ if getattr(rust, name) is not None}
    assert there == {"KvConnectorLeader", "KvConnectorWorker"}
