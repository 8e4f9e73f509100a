# SPDX-License-Identifier: Apache-2.0
"""How an engine is started: arguments of vLLM's ``LLM`` and the environment."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a user passes with --kv-transfer-config.
KVBM_TRANSFER_CONFIG: dict[str, Any] = {
    "kv_connector": "DynamoConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvbm.vllm_integration.connector",
}

# Read when vLLM or torch is imported, hence set for the server that imports them once.
IMPORT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The first request that asks for logprobs compiles a kernel for ten seconds otherwise.
    "TORCHDYNAMO_DISABLE": "1",
    # With more, the CPU build's and torch's OpenMP pools fight inside one process and a step takes
    # ten times longer. Worker processes set their own number.
    "OMP_NUM_THREADS": "1",
}

# What vLLM needs on a machine with a CUDA device, no network and no compiler of its kernels.
CUDA_ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Triton's attention multiplies float32 in tf32 otherwise, and outputs depend on the batch.
    "TRITON_F32_DEFAULT": "ieee",
}

CUDA_GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32],
    },
}


@dataclass(frozen=True)
class EngineSettings:
    """One engine.

    Greedy outputs are compared, so weights and KV are float32: in half precision the sums of
    another batch composition are enough to change tokens.
    """

    model: Path
    device: str = "cpu"  # or "cuda"
    cuda_graphs: bool = False  # whole steps of up to 32 tokens as one graph
    block_size: int = 32  # tokens; vLLM's CPU attention takes multiples of 32
    device_blocks: int = 64  # size of the engine's own cache
    max_model_len: int = 1024
    tensor_parallel: int = 1
    worker_processes: bool = False  # engine core and ranks in processes of their own
    prefix_caching: bool = True
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 16
    logprobs: bool = True  # two a token: for the comparison and for its margin
    kv_transfer_config: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    extra_arguments: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None  # called in the engine's process, before vLLM starts

    def device_tokens(self) -> int:
        """Tokens that the engine's own cache holds; vLLM keeps one block to itself."""
        return (self.device_blocks - 1) * self.block_size

    def llm_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``."""
        arguments: dict[str, Any] = {
            "model": str(self.model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "block_size": self.block_size,
            "num_gpu_blocks_override": self.device_blocks,
            "enable_prefix_caching": self.prefix_caching,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "tensor_parallel_size": self.tensor_parallel,
            "disable_log_stats": False,
        }
        if self.max_num_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = self.max_num_batched_tokens
        if self.kv_transfer_config is not None:
            arguments["kv_transfer_config"] = dict(self.kv_transfer_config)
        if self.device == "cuda":
            arguments["gpu_memory_utilization"] = 0.5
            # FlashAttention has no float32.
            arguments["attention_config"] = {"backend": "TRITON_ATTN"}
        if self.cuda_graphs:
            arguments |= CUDA_GRAPHS
        return arguments | self.extra_arguments

    def apply_environment(self) -> None:
        """Set this process's environment, kvbm's variables only as given here, and prepare it."""
        for name in [name for name in os.environ if name.startswith("DYN_")]:
            del os.environ[name]
        os.environ.update(IMPORT_ENVIRONMENT)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if self.worker_processes else "0"
        if self.device == "cpu":
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; device_blocks decides the size
            if self.worker_processes:
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = self._cores()
        else:
            os.environ.update(CUDA_ENVIRONMENT)
        os.environ.update(self.environment)
        if self.prepare is not None:
            self.prepare()

    def _cores(self) -> str:
        """One core a rank, as VLLM_CPU_OMP_THREADS_BIND wants it."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < self.tensor_parallel:
            raise RuntimeError(
                f"tensor_parallel={self.tensor_parallel} needs as many cores, "
                f"this process may use {len(cores)}"
            )
        return "|".join(str(core) for core in cores[: self.tensor_parallel])
