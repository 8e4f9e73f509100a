# SPDX-License-Identifier: Apache-2.0
"""A small Llama with random weights, sharp enough that wrong KV bytes change its outputs."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Part of the cache key: raise it when the recipe below changes.
RECIPE = 1

# With the usual initialisation attention is almost uniform and the residual stream drowns its
# output, so a wrong KV row changes nothing that greedy decoding can see. Larger queries and keys
# make attention peaked, larger values and outputs make it dominate the residual.
QUERY_KEY_GAIN = 1.6
VALUE_OUTPUT_GAIN = 2.0
LM_HEAD_GAIN = 4.0

BOS_TOKEN = 1
EOS_TOKEN = 2


@dataclass(frozen=True)
class ModelShape:
    """Shape of a Llama model; sizes are counts of elements."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    vocabulary: int = 2048
    positions: int = 16384

    def kv_bytes_per_token(self, element_bytes: int = 4) -> int:
        """Bytes that one token takes in the KV cache, over all layers and ranks."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


def make_model(folder: Path, shape: ModelShape, seed: int = 0) -> Path:
    """Write the model's directory once and return it.

    Parameters
    ----------
    folder : Path
        Where models are kept. A directory named after shape, seed and recipe is made in it, or
        used if it is there, so several processes may share the folder.
    shape : ModelShape
        Sizes of the model.
    seed : int
        Seed of the weights.

    Returns
    -------
    Path
        Directory with ``config.json``, ``generation_config.json`` and ``model.safetensors``.
    """
    key = json.dumps({"recipe": RECIPE, "seed": seed, **asdict(shape)}, sort_keys=True)
    target = folder / f"llama-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=folder))
    _write(draft, shape, seed)
    try:
        os.rename(draft, target)
    except OSError:  # another process was faster; both wrote the same bytes
        shutil.rmtree(draft)
        if not target.is_dir():
            raise
    return target


def _write(directory: Path, shape: ModelShape, seed: int) -> None:
    from safetensors.numpy import save_file

    (directory / "config.json").write_text(json.dumps(_config(shape), indent=1))
    generation = {"bos_token_id": BOS_TOKEN, "eos_token_id": EOS_TOKEN}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    save_file(_weights(shape, seed), directory / "model.safetensors", metadata={"format": "pt"})


def _config(shape: ModelShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": BOS_TOKEN,
        "eos_token_id": EOS_TOKEN,
    }


def _weights(shape: ModelShape, seed: int) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(seed)

    def random(rows: int, columns: int, gain: float) -> NDArray[np.float32]:
        values = generator.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(gain / np.sqrt(columns))

    hidden, inner = shape.hidden, shape.intermediate
    query_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = np.ones(hidden, np.float32)
    # The embedding has unit variance: its gain cancels the division by sqrt(hidden).
    weights = {"model.embed_tokens.weight": random(shape.vocabulary, hidden, np.sqrt(hidden))}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        weights[f"{attention}.q_proj.weight"] = random(query_rows, hidden, QUERY_KEY_GAIN)
        weights[f"{attention}.k_proj.weight"] = random(kv_rows, hidden, QUERY_KEY_GAIN)
        weights[f"{attention}.v_proj.weight"] = random(kv_rows, hidden, VALUE_OUTPUT_GAIN)
        weights[f"{attention}.o_proj.weight"] = random(hidden, query_rows, VALUE_OUTPUT_GAIN)
        weights[f"{prefix}.mlp.gate_proj.weight"] = random(inner, hidden, 1.0)
        weights[f"{prefix}.mlp.up_proj.weight"] = random(inner, hidden, 1.0)
        weights[f"{prefix}.mlp.down_proj.weight"] = random(hidden, inner, 1.0)
        weights[f"{prefix}.input_layernorm.weight"] = ones
        weights[f"{prefix}.post_attention_layernorm.weight"] = ones
    weights["model.norm.weight"] = ones
    weights["lm_head.weight"] = random(shape.vocabulary, hidden, LM_HEAD_GAIN)
    return weights
