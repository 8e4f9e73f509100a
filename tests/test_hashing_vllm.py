# SPDX-License-Identifier: Apache-2.0
"""What is said about vLLM's block hashes holds for the installed vLLM."""

import hashlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvbm._fast.keys import Keys
from kvbm.hashing import (
    MultimodalItem,
    RequestKeys,
    engine_hashes_usable,
    extra_keys,
)

pytestmark = [
    pytest.mark.slow,  # importing vLLM takes many seconds
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")


@pytest.fixture(scope="module")
def utils() -> Any:
    """Return vLLM's module of block hashes."""
    return pytest.importorskip("vllm.v1.core.kv_cache_utils")


@pytest.fixture(scope="module")
def functions() -> Any:
    """Return vLLM's module of hash functions."""
    return pytest.importorskip("vllm.utils.hashing")


def request(items: tuple[MultimodalItem, ...], embeds: Any, tokens: list[int]) -> Any:
    """Return what vLLM's hasher reads of a request."""
    features = [
        SimpleNamespace(
            identifier=item.identifier,
            mm_position=SimpleNamespace(offset=item.offset, length=item.length),
        )
        for item in items
    ]
    return SimpleNamespace(
        mm_features=features,
        lora_request=None,
        cache_salt=None,
        prompt_embeds=embeds,
        _prompt_embeds_per_block_hashes={},
        num_tokens=len(tokens),
        all_token_ids=tokens,
        block_hashes=[],
    )


def untagged(keys: Any) -> tuple[Any, ...]:
    """Return vLLM's extra keys as versions before 0.31 gave them, without their kinds."""
    return tuple(
        key[1:] if len(key) == 3 else key[1] if key[0] == "prompt_embeds" else key
        for key in keys or ()
    )


@pytest.mark.parametrize(
    "items",
    [
        (MultimodalItem("a", 0, 1),),
        (MultimodalItem("a", 3, 1),),
        (MultimodalItem("a", 3, 2), MultimodalItem("b", 5, 3)),
        (MultimodalItem("a", 4, 4), MultimodalItem("b", 8, 9), MultimodalItem("c", 18, 30)),
        (MultimodalItem("a", 2, 1), MultimodalItem("a", 3, 1), MultimodalItem("b", 21, 3)),
    ],
)
def test_the_blocks_and_keys_of_multimodal_items_are_vllms(
    utils: Any, items: tuple[MultimodalItem, ...]
) -> None:
    ours = extra_keys(RequestKeys(multimodal=items), 4)
    theirs = request(items, None, list(range(48)))
    index = 0
    for block in range(12):
        keys, index = utils.generate_block_hash_extra_keys(theirs, 4 * block, 4 * block + 4, index)
        assert untagged(keys) == tuple(key[1:] for key in ours.get(block, ()))


def test_the_key_of_prompt_embeddings_is_vllms(utils: Any) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24, dtype=torch.bfloat16).reshape(8, 3)
    rows = tensor.contiguous().view(torch.uint8).numpy()
    ours = extra_keys(RequestKeys(prompt_embeds=rows), 4)
    theirs = request((), tensor, list(range(8)))
    for block in range(2):
        keys, _ = utils.generate_block_hash_extra_keys(theirs, 4 * block, 4 * block + 4, 0)
        assert untagged(keys) == tuple(key[1] for key in ours[block])
    assert ours[1] == (("prompt_embeds", hashlib.sha256(rows[4:].tobytes()).digest()),)


def none_hashes(utils: Any, function: Any) -> set[bytes]:
    """Return the NONE_HASH of three processes, as far as one process can tell."""
    hashes = set()
    for _ in range(3):
        utils.init_none_hash(function)
        hashes.add(utils.NONE_HASH)
    return hashes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", [None, "0", "random"])
def test_hashes_said_to_be_usable_are_reproducible(
    utils: Any,
    functions: Any,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    seed: str | None,
) -> None:
    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    env = {} if seed is None else {"PYTHONHASHSEED": seed}
    default_seed = getattr(utils, "DEFAULT_NONE_HASH_SEED", None)
    reproducible = len(none_hashes(utils, functions.get_hash_fn_by_name(algorithm))) == 1
    cryptographic = algorithm.startswith("sha256")
    usable = engine_hashes_usable(algorithm, env, default_seed)
    assert usable == (reproducible and cryptographic)
    assert engine_hashes_usable(algorithm, env, default_seed, shared=False) == cryptographic


def test_request_block_hashes_become_digests(utils: Any, functions: Any) -> None:
    utils.init_none_hash(functions.sha256)
    tokens = np.random.default_rng(1).integers(0, 1000, 50).tolist()
    hashes = utils.get_request_block_hasher(4, functions.sha256)(request((), None, tokens))
    keys = Keys(hashes)
    assert len(keys) == 12
    identities = [keys.identity(i) for i in range(12)]
    assert [digest for digest, _ in identities] == [value[:16] for value in hashes]
    events = [int.from_bytes(value, "big") & (2**64 - 1) for value in hashes]
    assert [sequence_hash for _, sequence_hash in identities] == events
