# SPDX-License-Identifier: Apache-2.0
"""Hashing: a request's tokens to digests, and payload checksums; baselines in the same run.

``pytest bench/bench_hashing.py``. Groups:

tokens-N
    N tokens as a Python list, blocks of 16. ``first``: a new chain. ``again``: the same list with
    nothing new. ``one_block_more``: the list grew by a block. ``other_list``: equal tokens in
    another list, compared and not hashed. ``keyed``: digests by BLAKE2b. Baselines: the list to a
    NumPy array and nothing else; SHA-256 over pickled blocks, as vLLM hashes by default; one
    XXH3-64 a block by the xxhash package.
payload-SIZE
    One buffer: the dispatched and the portable code, the xxhash package, memcpy.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from typing import Any

import numpy as np
import pytest

from kvbm.hashing import pack_tokens, token_chain, xxh3_64

BLOCK_SIZE = 16
VOCABULARY = 150_000
TOKEN_COUNTS = [1_000, 8_000, 32_000, 128_000]
PAYLOAD_BYTES = [64 << 10, 256 << 10, 2 << 20, 16 << 20]
KEY = bytes(range(32))


@pytest.fixture(params=TOKEN_COUNTS)
def tokens(request: pytest.FixtureRequest, benchmark: Any) -> list[int]:
    """Return a list of distinct int objects in an order that is not that of the heap."""
    benchmark.group = f"tokens-{request.param}"
    source = random.Random(1)
    values = [source.randrange(VOCABULARY) for _ in range(request.param)]
    source.shuffle(values)
    return values


@pytest.fixture(params=PAYLOAD_BYTES)
def payload(request: pytest.FixtureRequest, benchmark: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a buffer of random bytes."""
    benchmark.group = f"payload-{request.param >> 10}-KiB"
    return np.random.default_rng(3).integers(0, 256, request.param, dtype=np.uint8)


def test_tokens_first(benchmark: Any, tokens: list[int]) -> None:
    def first() -> int:
        return token_chain(BLOCK_SIZE).update(tokens)

    assert benchmark(first) == len(tokens) // BLOCK_SIZE


def test_tokens_again(benchmark: Any, tokens: list[int]) -> None:
    chain = token_chain(BLOCK_SIZE)
    chain.update(tokens)
    assert benchmark(chain.update, tokens) == len(tokens) // BLOCK_SIZE


def test_tokens_one_block_more(benchmark: Any, tokens: list[int]) -> None:
    chain = token_chain(BLOCK_SIZE)
    tokens += range(BLOCK_SIZE)

    def before() -> tuple[tuple[list[int]], dict[str, Any]]:
        del tokens[-BLOCK_SIZE:]
        chain.update(tokens)
        tokens.extend(range(BLOCK_SIZE))
        return (tokens,), {}

    result = benchmark.pedantic(chain.update, setup=before, rounds=200)
    assert result == len(tokens) // BLOCK_SIZE


def test_tokens_other_list(benchmark: Any, tokens: list[int]) -> None:
    chain = token_chain(BLOCK_SIZE)
    chain.update(tokens)
    others = [list(tokens), list(tokens)]

    def other() -> int:
        others.reverse()
        return chain.update(others[0])

    assert benchmark(other) == len(tokens) // BLOCK_SIZE


def test_tokens_keyed(benchmark: Any, tokens: list[int]) -> None:
    def first() -> int:
        return token_chain(BLOCK_SIZE, key=KEY).update(tokens)

    assert benchmark(first) == len(tokens) // BLOCK_SIZE


def test_tokens_array_first(benchmark: Any, tokens: list[int]) -> None:
    array = np.array(tokens, dtype=np.uint32)

    def first() -> int:
        return token_chain(BLOCK_SIZE).update(array)

    assert benchmark(first) == len(tokens) // BLOCK_SIZE


def test_tokens_baseline_pack(benchmark: Any, tokens: list[int]) -> None:
    assert len(benchmark(pack_tokens, tokens)) == 4 * len(tokens)


def test_tokens_baseline_numpy(benchmark: Any, tokens: list[int]) -> None:
    assert len(benchmark(np.array, tokens, dtype=np.uint32)) == len(tokens)


def test_tokens_baseline_sha256(benchmark: Any, tokens: list[int]) -> None:
    def first() -> int:
        parent, count = bytes(32), 0
        for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
            block = (parent, tuple(tokens[start : start + BLOCK_SIZE]), None)
            parent = hashlib.sha256(pickle.dumps(block, protocol=5)).digest()
            count += 1
        return count

    assert benchmark(first) == len(tokens) // BLOCK_SIZE


def test_tokens_baseline_xxhash(benchmark: Any, tokens: list[int]) -> None:
    digest = pytest.importorskip("xxhash").xxh3_64_intdigest

    def first() -> int:
        data = memoryview(np.array(tokens, dtype=np.uint32)).cast("B")
        step, parent, count = 4 * BLOCK_SIZE, 0, 0
        for start in range(0, len(data) - step + 1, step):
            parent = digest(data[start : start + step], parent)
            count += 1
        return count

    assert benchmark(first) == len(tokens) // BLOCK_SIZE


def test_payload_xxh3(benchmark: Any, payload: Any) -> None:
    assert benchmark(xxh3_64, payload) == xxh3_64(payload, portable=True)


def test_payload_xxh3_portable(benchmark: Any, payload: Any) -> None:
    assert benchmark(xxh3_64, payload, portable=True) == xxh3_64(payload)


def test_payload_baseline_xxhash(benchmark: Any, payload: Any) -> None:
    digest = pytest.importorskip("xxhash").xxh3_64_intdigest
    assert benchmark(digest, payload) == xxh3_64(payload)


def test_payload_baseline_memcpy(benchmark: Any, payload: Any) -> None:
    target = np.zeros_like(payload)
    benchmark(np.copyto, target, payload)
    assert (target == payload).all()
