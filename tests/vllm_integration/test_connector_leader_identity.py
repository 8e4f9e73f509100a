# SPDX-License-Identifier: Apache-2.0
"""Requests share a block exactly if everything that decides about its KV is equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds

BLOCK = 16
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))
WHOLE = 4 * BLOCK
BLOCKS = [1, 2, 3, 4, 5]


def lora(name: str, path: str = "/adapters/one", number: int = 1) -> LoRARequest:
    """A LoRA adapter."""
    return LoRARequest(name, number, path)


def image(identifier: str, offset: int, length: int = 4) -> MultiModalFeatureSpec:
    """An image in the prompt."""
    known = {field.name for field in dataclasses.fields(MultiModalFeatureSpec)}
    optional = {"mm_hash": identifier} if "mm_hash" in known else {}
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=identifier,
        mm_position=PlaceholderRange(offset=offset, length=length),
        **optional,
    )


def embeddings(seed: int, rows: int = len(PROMPT)) -> torch.Tensor:
    """Prompt embeddings."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


Make = Callable[[], dict[str, Any]]

KINDS: dict[str, Make] = {
    "plain": dict,
    "salt x": lambda: {"cache_salt": "x"},
    "salt y": lambda: {"cache_salt": "y"},
    "lora x": lambda: {"lora_request": lora("x")},
    "lora y": lambda: {"lora_request": lora("y")},
    "lora x, salt x": lambda: {"lora_request": lora("x"), "cache_salt": "x"},
    "image a": lambda: {"mm_features": [image("a", 2)]},
    "image b": lambda: {"mm_features": [image("b", 2)]},
    "image a, moved": lambda: {"mm_features": [image("a", 3)]},
    "images a and b": lambda: {"mm_features": [image("a", 2), image("b", 8)]},
    "embeddings 1": lambda: {"prompt_embeds": embeddings(1)},
    "embeddings 2": lambda: {"prompt_embeds": embeddings(2)},
}


@pytest.mark.parametrize("algorithm", ["sha256", "xxhash"], ids=["vLLM's hashes", "our hashes"])
def test_each_kind_finds_its_own_blocks_and_nobody_elses(connect: Any, algorithm: str) -> None:
    engine = connect(algorithm, cpu_cache_override_num_blocks=4 * len(KINDS))
    values: dict[str, float] = {}

    def request(name: str, kind: str) -> Any:
        tokens = None if kind.startswith("embeddings") else PROMPT
        return engine.request(name, tokens, **KINDS[kind]())

    for number, kind in enumerate(KINDS):
        first = request(f"first {kind}", kind)
        assert engine.matched(first) == 0, kind
        values[kind] = 100.0 * (number + 1)
        engine.cache(first, BLOCKS, values[kind])
    for number, kind in enumerate(KINDS):
        blocks = [10 + number] * 5
        assert engine.load(request(f"second {kind}", kind), [*blocks[:4], 60]) == WHOLE, kind
        assert engine.value(blocks[0]) is not None
        third = request(f"third {kind}", kind)
        assert engine.load(third, [51, 52, 53, 54, 55]) == WHOLE
        assert [engine.value(b) for b in (51, 52, 53, 54)] == [values[kind] + i for i in range(4)]


def test_an_image_changes_the_blocks_from_its_own_on(connect: Any) -> None:
    engine = connect()
    engine.cache(engine.request("plain", PROMPT), BLOCKS, 10)
    late = {"mm_features": [image("a", 2 * BLOCK + 1)]}
    assert engine.matched(engine.request("image", PROMPT, **late)) == 2 * BLOCK


@pytest.mark.parametrize("algorithm", ["sha256", "xxhash"])
def test_adapters_of_one_name_and_different_paths_share_nothing(
    connect: Any, algorithm: str
) -> None:
    engine = connect(algorithm)
    first = engine.request("first", PROMPT, lora_request=lora("x", "/adapters/old"))
    engine.cache(first, BLOCKS, 10)
    other = engine.request("other", PROMPT, lora_request=lora("x", "/adapters/new", 2))
    assert engine.matched(other) == 0
    same = engine.request("same", PROMPT, lora_request=lora("x", "/adapters/old"))
    assert engine.matched(same) == WHOLE


@pytest.mark.parametrize("algorithm", ["sha256", "xxhash"])
def test_images_that_a_streaming_session_adds_enter_the_later_blocks(
    connect: Any, algorithm: str
) -> None:
    engine = connect(algorithm)
    session = engine.request("session", PROMPT[: 2 * BLOCK])
    engine.allocate(session, BLOCKS)
    engine.step({"session": 2 * BLOCK}, lambda: engine.fill([1, 2], 10))
    session.mm_features.append(image("a", 2 * BLOCK + 1))
    session._all_token_ids.extend(PROMPT[2 * BLOCK : 3 * BLOCK])
    session.update_block_hashes()
    engine.step({"session": BLOCK}, lambda: engine.fill([1, 2, 3], 10))
    engine.run_until(lambda: not engine.side.leader._storing)
    assert engine.matched(engine.request("plain", PROMPT)) == 2 * BLOCK
    features = [image("a", 2 * BLOCK + 1)]
    assert engine.matched(engine.request("image", PROMPT, mm_features=features)) == 3 * BLOCK
    features = [image("b", 2 * BLOCK + 1)]
    assert engine.matched(engine.request("other", PROMPT, mm_features=features)) == 2 * BLOCK
