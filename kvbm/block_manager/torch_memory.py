# SPDX-License-Identifier: Apache-2.0
"""What is asked of torch: memory on a GPU where there is one, and the stream that it works on."""

import torch

from kvbm.block_manager.memory import BlockShape
from kvbm.errors import ConfigError
from kvbm.transfer.backends import Device

_TORCH = {
    "fp8": torch.uint8,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}


def allocate(num_blocks: int, shape: BlockShape, device_id: int) -> torch.Tensor:
    """Allocate a tensor ``[num_blocks, layers, outer, tokens, inner]``, zeroed.

    Raises
    ------
    ConfigError
        There are GPUs, but none of that number.
    """
    device = "cpu"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if not 0 <= device_id < count:
            raise ConfigError(f"device_id={device_id} is not valid (allowed: 0 to {count - 1})")
        device = f"cuda:{device_id}"
    return torch.zeros((num_blocks, *shape.axes), dtype=_TORCH[shape.element.name], device=device)


def cuda_device(index: int | None) -> Device:
    """GPU of a tensor (None: torch's current one), with the stream of the thread that asks."""
    ordinal = torch.cuda.current_device() if index is None else index
    return Device("cuda", ordinal, lambda: int(torch.cuda.current_stream(ordinal).cuda_stream))
