# SPDX-License-Identifier: Apache-2.0
"""Block hashes of the engine as keys: what is read of each, and that they are read in place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm._fast.hashing import digest_for_epoch, digest_for_group
from kvbm._fast.keys import Keys
from tests.fast.instances import digests

ENGINE_HASHES = st.lists(st.binary(min_size=16, max_size=40), max_size=40)
NUMBERS = st.integers(0, 2**32 - 1)


@given(ENGINE_HASHES, st.integers(1, 4))
def test_a_block_takes_both_ends_of_the_last_hash_in_it(hashes: list[bytes], stride: int) -> None:
    keys = Keys(hashes, stride)
    last = hashes[stride - 1 :: stride]
    assert len(keys) == len(last)
    assert [keys.identity(i) for i in range(len(last))] == [
        (value[:16], int.from_bytes(value[-8:], "big")) for value in last
    ]


def test_hashes_are_read_when_asked_for_and_the_list_may_grow() -> None:
    hashes: list[bytes] = []
    keys = Keys(hashes)
    assert len(keys) == 0
    hashes.append(b"a" * 32)
    assert (len(keys), keys.identity(0)[0]) == (1, b"a" * 16)
    hashes[0] = b"b" * 32
    assert keys.identity(0)[0] == b"b" * 16


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16), NUMBERS, NUMBERS)
def test_mix_group_and_epoch_change_the_digest_and_not_the_sequence_hash(
    block_hash: bytes, mix: bytes, group: int, epoch: int
) -> None:
    digest, sequence_hash = Keys([block_hash], 1, group, mix).identity(0, epoch)
    mixed = bytes(a ^ b for a, b in zip(block_hash, mix, strict=False))
    assert digest == digest_for_epoch(digest_for_group(mixed, group), epoch)
    assert sequence_hash == int.from_bytes(block_hash[-8:], "big")


@pytest.mark.parametrize("bad", [b"x" * 15, b"", 12345, None])
def test_a_bad_hash_is_named_and_the_others_stay_usable(bad: object) -> None:
    keys = Keys([b"a" * 32, bad, b"c" * 32])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"block hash 1 is .*; 16 bytes or more are needed"):
        keys.identity(1)
    assert keys.identity(2)[0] == b"c" * 16


@pytest.mark.parametrize("index", [-1, 2, 2**40])
def test_blocks_that_are_not_complete_are_refused(index: int) -> None:
    keys = Keys([b"a" * 32] * 5, 2)
    with pytest.raises(IndexError, match=f"block {index}: there are 2 complete blocks"):
        keys.identity(index)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_below_one_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride {stride}: at least 1"):
        Keys([], stride)


def test_a_mix_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="mix has 15 bytes: 16 are needed"):
        Keys([], mix=bytes(15))


def test_a_source_that_is_neither_list_nor_chain_is_refused() -> None:
    with pytest.raises(TypeError, match="list of bytes or a DigestChain, not tuple"):
        Keys((b"a" * 32,))  # type: ignore[arg-type]


def test_sequence_hashes_in_bulk_are_those_of_the_blocks() -> None:
    keys = Keys(digests(5))
    found = np.frombuffer(keys.sequence_hashes(1, 4), np.uint64).tolist()
    assert found == [keys.identity(index)[1] for index in (1, 2, 3)]
    assert keys.sequence_hashes(2, 2) == b""


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_sequence_hashes_outside_of_the_blocks_are_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="there are 5 complete blocks"):
        Keys(digests(5)).sequence_hashes(start, stop)
