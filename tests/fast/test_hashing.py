# SPDX-License-Identifier: Apache-2.0
"""XXH3 equals the reference implementation; digest arithmetic; chains of engine hashes."""

import hashlib
import random

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from kvbm._fast.hashing import (
    DigestChain,
    EngineChain,
    digest_for_epoch,
    digest_for_group,
    xxh3_64,
)

SEEDS = st.integers(0, 2**64 - 1)
DIGESTS = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(0, 2**32 - 1)
ENGINE_HASHES = st.lists(st.binary(min_size=32, max_size=32), max_size=40)


def chained(values: list[int]) -> list[bytes]:
    """Return block hashes as an engine makes them: each over the one before it."""
    hashes: list[bytes] = []
    for value in values:
        parent = hashes[-1] if hashes else b""
        hashes.append(hashlib.sha256(parent + bytes([value])).digest())
    return hashes


def pattern(size: int) -> bytes:
    """Return `size` bytes without a short period."""
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("first", range(0, 2049, 241))
def test_each_length_gives_the_reference_hash(first: int) -> None:
    for size in range(first, min(first + 241, 2049)):
        data = pattern(size)
        for seed in (0, 1, 1337, 2**63, 2**64 - 1, xxhash.xxh64_intdigest(data)):
            expected = xxhash.xxh3_64_intdigest(data, seed)
            assert xxh3_64(data, seed) == expected, size
            assert xxh3_64(data, seed, portable=True) == expected, size


@given(st.binary(max_size=2048), SEEDS)
@example(b"", 0)
def test_any_bytes_and_seed_give_the_reference_hash(data: bytes, seed: int) -> None:
    expected = xxhash.xxh3_64_intdigest(data, seed)
    assert xxh3_64(data, seed) == expected
    assert xxh3_64(data, seed, portable=True) == expected


@pytest.mark.parametrize(
    "size",
    [1024 * blocks + rest for blocks in (2, 3, 64, 1023) for rest in (-65, -64, -1, 0, 1, 63, 64)],
)
def test_long_inputs_give_the_reference_hash(size: int) -> None:
    data = pattern(size)
    expected = xxhash.xxh3_64_intdigest(data, 42)
    assert xxh3_64(data, 42) == expected
    assert xxh3_64(data, 42, portable=True) == expected


@pytest.mark.parametrize("offset", range(1, 33))
def test_alignment_of_the_input_does_not_matter(offset: int) -> None:
    data = pattern(1500)
    for size in (3, 8, 16, 100, 200, 1400):
        view = memoryview(data)[offset : offset + size]
        assert xxh3_64(view, 7) == xxhash.xxh3_64_intdigest(bytes(view), 7)


def test_pieces_chained_by_seed_depend_on_their_order() -> None:
    first, second = pattern(500), pattern(700)
    one_way = xxh3_64(second, xxh3_64(first))
    assert one_way == xxhash.xxh3_64_intdigest(second, xxhash.xxh3_64_intdigest(first))
    assert one_way != xxh3_64(first, xxh3_64(second))


def test_buffers_of_any_type_are_hashed_as_their_bytes() -> None:
    array = np.arange(1000, dtype=np.int16)
    expected = xxhash.xxh3_64_intdigest(array.tobytes())
    assert xxh3_64(array) == xxh3_64(bytearray(array.tobytes())) == expected


def test_what_is_no_contiguous_buffer_is_refused() -> None:
    with pytest.raises(TypeError):
        xxh3_64("text")  # type: ignore[arg-type]
    with pytest.raises((BufferError, ValueError)):
        xxh3_64(np.arange(10)[::2])


@given(DIGESTS, NUMBERS)
def test_mixes_are_their_own_inverse(digest: bytes, number: int) -> None:
    for mix in (digest_for_group, digest_for_epoch):
        assert mix(mix(digest, number), number) == digest


@given(DIGESTS)
def test_group_and_epoch_zero_change_nothing(digest: bytes) -> None:
    assert digest_for_group(digest, 0) == digest
    assert digest_for_epoch(digest, 0) == digest


@given(DIGESTS, NUMBERS, NUMBERS)
def test_two_groups_or_epochs_never_share_a_digest(digest: bytes, one: int, other: int) -> None:
    for mix in (digest_for_group, digest_for_epoch):
        assert (mix(digest, one) == mix(digest, other)) == (one == other)


def test_small_groups_and_epochs_do_not_meet_in_either_half() -> None:
    zero = bytes(16)
    mixed = [
        digest_for_epoch(digest_for_group(zero, group), epoch)
        for group in range(16)
        for epoch in range(256)
    ]
    assert len({digest[:8] for digest in mixed}) == len(mixed)
    assert len({digest[8:] for digest in mixed}) == len(mixed)


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_digests_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"digest has {size} bytes: 16 are needed"):
        digest_for_group(bytes(size), 1)


@given(ENGINE_HASHES, st.integers(1, 4))
def test_engine_digests_are_the_first_bytes_of_the_last_hash_of_a_block(
    hashes: list[bytes], scale: int
) -> None:
    chain = EngineChain(scale)
    assert chain.update(hashes) == len(chain) == len(hashes) // scale
    last = hashes[scale - 1 :: scale]
    assert chain.digests() == b"".join(block_hash[:16] for block_hash in last)
    assert chain.sequence_hashes() == [int.from_bytes(value[-8:], "big") for value in last]


def test_a_known_last_hash_proves_what_is_before_it() -> None:
    hashes = [bytes([i]) * 32 for i in range(20)]
    chain = EngineChain()
    chain.update(hashes)
    digests = chain.digests()
    hashes[3] = None  # type: ignore[call-overload]  # would be an error if it were read again
    hashes.append(b"x" * 32)
    assert chain.update(hashes) == 21
    assert chain.digests() == digests + b"x" * 16


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(1, 3),
)
def test_an_updated_engine_chain_equals_a_fresh_one(
    first: list[int], second: list[int], scale: int
) -> None:
    chain, fresh = EngineChain(scale), EngineChain(scale)
    chain.update(chained(first))
    chain.update(chained(second))
    fresh.update(chained(second))
    assert chain.digests() == fresh.digests()
    assert chain.sequence_hashes() == fresh.sequence_hashes()


def test_a_mix_is_exclusive_ored_with_each_digest() -> None:
    mix, block_hash = bytes(range(16)), b"\xf0" * 32
    chain = EngineChain(mix=mix)
    chain.update((block_hash, block_hash))
    assert chain.digest(1) == bytes(0xF0 ^ value for value in mix)
    assert chain.update((block_hash, block_hash, block_hash)) == 3
    assert chain.digests() == 3 * chain.digest(0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (b"x" * 15, ValueError, "block hash 2 has 15 bytes: 16 are needed"),
        (12345, TypeError, "block hash 2 is 12345: bytes are needed"),
    ],
)
def test_a_bad_engine_hash_is_named_and_ends_the_chain(
    bad: object, error: type[Exception], message: str
) -> None:
    chain = EngineChain()
    with pytest.raises(error, match=message):
        chain.update([b"a" * 32, b"b" * 32, bad, b"c" * 32])  # type: ignore[list-item]
    assert chain.digests() == b"a" * 16 + b"b" * 16


def test_truncated_engine_chains_grow_again() -> None:
    hashes = [random.Random(i).randbytes(32) for i in range(8)]
    chain = EngineChain()
    chain.update(hashes)
    digests = chain.digests()
    chain.truncate(3)
    assert chain.digests() == digests[:48]
    chain.truncate(5)
    assert len(chain) == 3
    chain.update(hashes)
    assert chain.digests() == digests
    with pytest.raises(ValueError, match="count=-1"):
        chain.truncate(-1)


@pytest.mark.parametrize("scale", [0, -1])
def test_a_scale_below_one_is_refused(scale: int) -> None:
    with pytest.raises(ValueError, match=f"scale={scale} is not allowed"):
        EngineChain(scale)


def test_blocks_outside_the_chain_are_refused() -> None:
    chain = EngineChain()
    chain.update([b"a" * 32])
    for index in (-1, 1, 2**40):
        with pytest.raises(IndexError, match=f"block {index}: the chain has 1"):
            chain.digest(index)
        with pytest.raises(IndexError, match=f"block {index}: the chain has 1"):
            chain.sequence_hash(index)
    for start in (-1, 2):
        with pytest.raises(IndexError, match=f"start {start}: the chain has 1"):
            chain.digests(start)
        with pytest.raises(IndexError, match=f"start {start}: the chain has 1"):
            chain.sequence_hashes(start)
    assert chain.digests(1) == b""
    assert chain.sequence_hashes(1) == []


def test_an_empty_chain_has_no_digests() -> None:
    for chain in (DigestChain(), EngineChain()):
        assert (len(chain), chain.digests(), chain.sequence_hashes()) == (0, b"", [])
