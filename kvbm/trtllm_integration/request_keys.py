# SPDX-License-Identifier: Apache-2.0
"""What changes the KV of a TensorRT-LLM request besides its tokens, as far as it can be told.

At a request's admission TensorRT-LLM hands its C++ object, so only what its bindings show can be
read. Where something that matters cannot be read, or is more than a name, the request is not
cached: it runs as it would without kvbm.
"""

from __future__ import annotations

from typing import Any

from kvbm.hashing import RequestKeys
from kvbm.trtllm_integration import compat

# Inputs that are not tokens; those of images and audio have hashes beside them, others have not.
OTHER_INPUTS = (
    "multimodal_hashes",
    "multimodal_positions",
    "multimodal_embedding",
    "prompt_embedding_table",
)


def why_not_cached(request: Any) -> str | None:
    """Return what stands against caching a request; None if nothing does."""
    if getattr(request, "is_dummy_request", False):
        return "it is a dummy"
    for name in OTHER_INPUTS:
        value = getattr(request, name)
        if value is not None and (not hasattr(value, "__len__") or len(value)):
            return f"it has inputs that are not tokens ({name})"
    if request.return_context_logits:
        return "it wants the logits of its prompt"
    return None


def request_keys(request: Any, engine_id: str) -> RequestKeys:
    """Return what changes the KV of a request besides its tokens.

    An adapter is known by its number, which says nothing about its weights, so its blocks are found
    by the engine that made them and by no other one.
    """
    task = request.lora_task_id
    return RequestKeys(
        salt=compat.salt_of(request),
        lora_name=None if task is None else str(task),
        lora_path=None if task is None else f"{engine_id}/{task}",
    )
