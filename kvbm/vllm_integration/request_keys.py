# SPDX-License-Identifier: Apache-2.0
"""What changes the KV of a vLLM request besides its tokens."""

from typing import TYPE_CHECKING, Any

from kvbm.hashing import MultimodalItem, RequestKeys

if TYPE_CHECKING:
    from vllm.v1.request import Request


def request_keys(request: "Request") -> RequestKeys:
    """What changes the KV of a request besides its tokens."""
    lora = request.lora_request
    embeds = request.prompt_embeds
    return RequestKeys(
        salt=request.cache_salt,
        lora_name=None if lora is None else lora.lora_name,
        lora_path=None if lora is None else getattr(lora, "lora_path", None),
        multimodal=tuple(
            MultimodalItem(f.identifier, f.mm_position.offset, f.mm_position.length)
            for f in request.mm_features or ()
        ),
        prompt_embeds=None if embeds is None else embedding_bytes(embeds),
    )


def embedding_bytes(embeds: Any) -> Any:
    """Bytes of prompt embeddings, one row a token, whatever their type."""
    import torch

    return embeds.detach().cpu().contiguous().view(torch.uint8).numpy()
