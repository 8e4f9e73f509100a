# SPDX-License-Identifier: Apache-2.0
"""Requests that differ in anything that changes their KV share no digest; equal ones share all."""

import hashlib
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvbm._fast.keys import Keys
from kvbm.hashing import (
    NO_KEYS,
    ROUTER_SEED,
    MultimodalItem,
    RequestKeys,
    TokenChain,
    engine_hashes_problem,
    engine_hashes_usable,
    extra_keys,
    identity_mix,
    salt_hash,
    salt_payload,
    token_chain,
    xxh3_64,
)

KEY = b"a key of 16 byte"
TOKENS = list(range(64))
SIZE = 4

# (salt, LoRA name): payload, salt hash, sequence hashes of tokens 1 to 12 in blocks of 4.
KVBM_1: dict[tuple[str | None, str | None], tuple[bytes, int, list[int]]] = {
    (None, None): (
        b"{}",
        1389868326933519382,
        [8026409477313730465, 8178148779430958753, 9514044744703128477],
    ),
    ("abc", None): (
        b'{"salt":"abc"}',
        7355571969895925867,
        [15671499766538435518, 12759907381196348017, 9140683794527361928],
    ),
    (None, "l1"): (
        b'{"lora_name":"l1"}',
        811298355716206763,
        [12597922235817347560, 18429447712358635544, 13217352872209693789],
    ),
    ("abc", "l1"): (
        b'{"salt":"abc","lora_name":"l1"}',
        10141495552284851398,
        [12454984150165372482, 17175006906561095815, 4855883312919955153],
    ),
}


def hashed(tokens: list[int], keys: RequestKeys = NO_KEYS, **options: Any) -> TokenChain:
    """Return the chain of a request in blocks of `SIZE` tokens."""
    chain = token_chain(SIZE, keys, **options)
    chain.update(tokens)
    return chain


def digests(chain: TokenChain) -> list[bytes]:
    """Return the digests of a chain."""
    return [chain.digest(index) for index in range(len(chain))]


@pytest.mark.parametrize(("fields", "expected"), KVBM_1.items())
def test_salt_and_sequence_hashes_are_those_of_kvbm_1(
    fields: tuple[str | None, str | None], expected: tuple[bytes, int, list[int]]
) -> None:
    salt, lora_name = fields
    payload, seed, sequence = expected
    assert salt_payload(salt, lora_name) == payload
    assert salt_hash(salt, lora_name) == seed
    chain = hashed(list(range(1, 13)), RequestKeys(salt=salt, lora_name=lora_name))
    assert chain.sequence_hashes() == sequence


@pytest.mark.parametrize(
    ("salt", "payload"),
    [
        ("", b'{"salt":""}'),
        ("ä\x7f", b'{"salt":"\xc3\xa4\x7f"}'),
        ('"\\/\n\t\r\b\f', b'{"salt":"\\"\\\\/\\n\\t\\r\\b\\f"}'),
        ("\x00\x1f", b'{"salt":"\\u0000\\u001f"}'),
        ("\ud800", b'{"salt":"\xed\xa0\x80"}'),
    ],
)
def test_salts_are_escaped_as_serde_json_does(salt: str, payload: bytes) -> None:
    assert salt_payload(salt) == payload
    assert salt_hash(salt) == xxhash.xxh3_64_intdigest(payload)


def test_the_router_seed_gives_the_router_keys() -> None:
    chain = TokenChain(2, ROUTER_SEED)
    chain.extend([1, 2, 3, 4])
    local = [xxh3_64(np.array(pair, dtype=np.uint32), ROUTER_SEED) for pair in ([1, 2], [3, 4])]
    assert chain.sequence_hash(0) == local[0]
    assert chain.sequence_hash(1) == xxh3_64(np.array(local, dtype=np.uint64), ROUTER_SEED)


FIELDS = st.none() | st.sampled_from(["", "a", "b", "abc"])
ITEMS = st.builds(
    MultimodalItem,
    st.sampled_from(["image-1", "image-2"]),
    st.integers(0, 20),
    st.integers(1, 20),
)
KEYS = st.builds(
    RequestKeys,
    salt=FIELDS,
    lora_name=FIELDS,
    lora_path=FIELDS,
    multimodal=st.tuples() | st.tuples(ITEMS),
)


@given(KEYS, KEYS, st.sampled_from([None, KEY]))
def test_requests_share_digests_before_they_differ_and_none_after(
    one: RequestKeys, other: RequestKeys, key: bytes | None
) -> None:
    chains = [hashed(TOKENS, keys, key=key) for keys in (one, other)]
    where = [extra_keys(keys, SIZE) for keys in (one, other)]
    whole = [(keys.salt, keys.lora_name, keys.lora_path) for keys in (one, other)]
    same = whole[0] == whole[1]
    for index in range(len(TOKENS) // SIZE):
        same = same and where[0].get(index) == where[1].get(index)
        assert (chains[0].digest(index) == chains[1].digest(index)) == same


def test_each_difference_alone_separates_two_requests() -> None:
    image = MultimodalItem("image", 1, 10)
    embeds = np.zeros((8, 2), dtype=np.float16)
    base = RequestKeys("salt", "lora", "/lora", (image,), embeds)
    changed = embeds.copy()
    changed[0, 1] = 1
    variants = [
        base,
        replace(base, salt=None),
        replace(base, salt="other"),
        replace(base, salt="lora", lora_name="salt"),
        replace(base, lora_name=None),
        replace(base, lora_name="other"),
        replace(base, lora_path="/other"),
        replace(base, multimodal=()),
        replace(base, multimodal=(replace(image, identifier="other"),)),
        replace(base, multimodal=(replace(image, offset=2),)),
        replace(base, multimodal=(image, image)),
        replace(base, prompt_embeds=None),
        replace(base, prompt_embeds=changed),
    ]
    for key in (None, KEY):
        seen = [set(digests(hashed(TOKENS, keys, key=key))) for keys in variants]
        for one, other in combinations(range(len(variants)), 2):
            assert not seen[one] & seen[other], (one, other)


def test_extra_keys_separate_sequence_hashes_too() -> None:
    plain = hashed(TOKENS)
    image = hashed(TOKENS, RequestKeys(multimodal=(MultimodalItem("image", 9, 3),)))
    assert plain.sequence_hashes()[:2] == image.sequence_hashes()[:2]
    assert not set(plain.sequence_hashes()[2:]) & set(image.sequence_hashes()[2:])


def test_an_item_enters_the_blocks_it_touches_with_its_offset_there() -> None:
    keys = RequestKeys(
        multimodal=(MultimodalItem("a", 3, 6), MultimodalItem("b", 9, 1), MultimodalItem("c", 9, 0))
    )
    assert extra_keys(keys, 4) == {
        0: (("mm", "a", 3),),
        1: (("mm", "a", -1),),
        2: (("mm", "a", -5), ("mm", "b", 1), ("mm", "c", 1)),
    }


def test_prompt_embeddings_enter_the_blocks_that_have_rows() -> None:
    embeds = np.arange(10, dtype=np.float32).reshape(5, 2)
    keys = RequestKeys(multimodal=(MultimodalItem("a", 0, 1),), prompt_embeds=embeds)
    assert extra_keys(keys, 4) == {
        0: (("mm", "a", 0), ("prompt_embeds", hashlib.sha256(embeds[:4].tobytes()).digest())),
        1: (("prompt_embeds", hashlib.sha256(embeds[4:].tobytes()).digest()),),
    }
    assert extra_keys(RequestKeys(prompt_embeds=embeds[:0]), 4) == {}


def test_prompt_embeddings_that_are_not_contiguous_are_refused() -> None:
    embeds = np.zeros((4, 4))[:, ::2]
    with pytest.raises(ValueError, match="prompt_embeds is not a C-contiguous buffer"):
        token_chain(4, RequestKeys(prompt_embeds=embeds))


def test_keyed_digests_are_blake2b_of_the_chain() -> None:
    chain = hashed(TOKENS[:8], key=KEY)
    message = chain.digest(0) + np.array(TOKENS[4:8], dtype=np.uint32).tobytes()
    expected = hashlib.blake2b(message, digest_size=16, key=KEY, person=b"kvbm-digest-1")
    assert chain.digest(1) == expected.digest()
    assert chain.sequence_hashes() == hashed(TOKENS[:8]).sequence_hashes()


def test_another_key_or_none_shares_no_digest() -> None:
    chains = [hashed(TOKENS), hashed(TOKENS, key=KEY), hashed(TOKENS, key=KEY + b"x")]
    seen = [set(digests(chain)) for chain in chains]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


@pytest.mark.parametrize("size", [0, 15, 65])
def test_a_key_of_a_length_that_is_not_allowed_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"key has {size} bytes: 16 to 64 are allowed"):
        token_chain(4, key=bytes(size))


@pytest.mark.parametrize(
    ("algorithm", "env", "default_seed", "shared", "usable"),
    [
        ("sha256", {}, "vllm-none-hash", True, True),
        ("sha256_cbor", {}, "vllm-none-hash", True, True),
        ("sha256", {}, None, True, False),
        ("sha256_cbor", {}, None, True, False),
        ("sha256", {}, None, False, True),
        ("sha256", {"PYTHONHASHSEED": "0"}, None, True, True),
        ("sha256", {"PYTHONHASHSEED": "random"}, None, True, True),
        ("sha256_cbor", {"PYTHONHASHSEED": ""}, None, True, True),
        ("xxhash", {"PYTHONHASHSEED": "0"}, "vllm-none-hash", True, False),
        ("xxhash_cbor", {"PYTHONHASHSEED": "0"}, "vllm-none-hash", False, False),
        ("builtin", {"PYTHONHASHSEED": "0"}, None, False, False),
        ("SHA256", {}, "vllm-none-hash", True, False),
        ("", {}, "vllm-none-hash", True, False),
    ],
)
def test_engine_hashes_count_if_collision_resistant_and_reproducible(
    algorithm: str, env: dict[str, str], default_seed: str | None, shared: bool, usable: bool
) -> None:
    assert engine_hashes_usable(algorithm, env, default_seed, shared=shared) is usable
    problem = engine_hashes_problem(algorithm, env, default_seed, shared=shared)
    assert (problem is None) is usable


def test_the_problem_with_engine_hashes_names_what_to_change() -> None:
    problem = engine_hashes_problem("xxhash", {})
    assert problem is not None
    assert "prefix_caching_hash_algo='xxhash'" in problem
    assert "sha256 or sha256_cbor" in problem
    problem = engine_hashes_problem("sha256", {})
    assert problem is not None
    assert "PYTHONHASHSEED" in problem


def test_engine_hashes_that_forget_salt_or_adapter_are_told_apart() -> None:
    hashes = [hashlib.sha256(b"vLLM 0.30 gives these two requests the same hash").digest()]
    variants = [
        RequestKeys(salt="x"),
        RequestKeys(lora_name="x"),
        RequestKeys(lora_name="x", lora_path="/one"),
        RequestKeys(lora_name="x", lora_path="/two"),
        NO_KEYS,
    ]
    seen = {Keys(hashes, mix=identity_mix(keys)).identity(0)[0] for keys in variants}
    assert len(seen) == len(variants)
    assert identity_mix(NO_KEYS) == bytes(16)
    assert hashes[0][:16] in seen
