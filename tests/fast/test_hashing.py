# SPDX-License-Identifier: Apache-2.0
"""XXH3 equals the reference implementation; digest arithmetic."""

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from kvbm._fast.hashing import (
    DigestChain,
    digest_for_epoch,
    digest_for_group,
    xxh3_64,
)

SEEDS = st.integers(0, 2**64 - 1)
DIGESTS = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(0, 2**32 - 1)


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


def test_an_empty_chain_has_no_digests() -> None:
    chain = DigestChain()
    assert (len(chain), chain.digests(), chain.sequence_hashes()) == (0, b"", [])
