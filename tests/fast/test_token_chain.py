# SPDX-License-Identifier: Apache-2.0
"""The chain equals its definition, whatever edits led to its tokens, and reads only what is new."""

import struct
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvbm._fast.hashing import DigestChain
from kvbm._fast.token_chain import TokenBlock, TokenChain

TOKENS = st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), max_size=60)
IDENTITY = bytes(range(32))


def reference(
    tokens: list[int], size: int, salt: int, identity: bytes, extra: dict[int, bytes]
) -> list[tuple[int, int, bytes]]:
    """Return (block hash, sequence hash, digest) of each block, straight from the definition."""
    seed_lo, seed_hi = struct.unpack("<2Q", identity[:16])
    digest, sequence = identity[16:], 0
    blocks: list[tuple[int, int, bytes]] = []
    for index in range(len(tokens) // size):
        content = struct.pack(f"<{size}I", *tokens[index * size : (index + 1) * size])
        content += extra.get(index, b"")
        block = xxhash.xxh3_64_intdigest(content, salt)
        pair = struct.pack("<2Q", sequence, block)
        sequence = xxhash.xxh3_64_intdigest(pair, salt) if index else block
        lanes = [xxhash.xxh3_64_intdigest(digest + content, seed) for seed in (seed_lo, seed_hi)]
        digest = struct.pack("<2Q", *lanes)
        blocks.append((block, sequence, digest))
    return blocks


def state(chain: TokenChain) -> list[tuple[int, int, bytes]]:
    """Return (block hash, sequence hash, digest) of each block."""
    return [(block.block_hash, block.sequence_hash, block.digest) for block in chain.blocks()]


def test_known_values_of_kvbm_1() -> None:
    chain = TokenChain(4, 1337)
    assert chain.extend(range(1, 13)) == range(3)
    assert chain.sequence_hashes() == [
        14643705804678351452,
        4945711292740353085,
        12583592247330656132,
    ]
    assert [chain.block_hash(i) for i in range(3)] == [
        14643705804678351452,
        16777012769546811212,
        483935686894639516,
    ]


@given(
    TOKENS,
    st.sampled_from([1, 2, 3, 4, 16, 29, 30]),
    st.integers(0, 2**64 - 1),
    st.dictionaries(st.integers(0, 5), st.binary(min_size=32, max_size=32), max_size=3),
)
def test_a_chain_equals_its_definition(
    tokens: list[int], size: int, salt: int, extra: dict[int, bytes]
) -> None:
    chain = TokenChain(size, salt, identity=IDENTITY, extra=extra)
    chain.update(tokens)
    expected = reference(tokens, size, salt, IDENTITY, extra)
    assert state(chain) == expected
    assert chain.digests() == b"".join(digest for _, _, digest in expected)
    assert chain.sequence_hashes() == [sequence for _, sequence, _ in expected]


@pytest.mark.parametrize("size", [16, 32, 56, 57, 64, 128, 1024, 65536])
def test_every_block_size_equals_the_definition(size: int) -> None:
    tokens = np.random.default_rng(size).integers(0, 150_000, 2 * size + 1).tolist()
    extra = {1: bytes(range(32))}
    chain = TokenChain(size, 5, identity=IDENTITY, extra=extra)
    chain.extend(tokens)
    assert state(chain) == reference(tokens, size, 5, IDENTITY, extra)


def test_blocks_tell_their_tokens_and_parents() -> None:
    chain = TokenChain(2, 1)
    chain.extend([10, 11, 12, 13, 14])
    first, second = chain.blocks()
    assert first == TokenBlock(
        (10, 11), chain.block_hash(0), chain.sequence_hash(0), None, chain.digest(0)
    )
    assert second.tokens == (12, 13)
    assert second.parent_sequence_hash == first.sequence_hash
    assert chain.tokens() == [10, 11, 12, 13, 14]
    assert chain.tokens(4) == [14]


class Edits(RuleBasedStateMachine):
    """Random edits of a chain beside the same edits of a list."""

    size = 4

    def __init__(self) -> None:
        super().__init__()
        self.chain = TokenChain(self.size, 77, identity=IDENTITY, extra={1: b"e" * 32})
        self.model: list[int] = []
        self.list: list[int] = []

    @rule(tokens=TOKENS)
    def extend(self, tokens: list[int]) -> None:
        before = len(self.model) // self.size
        self.model += tokens
        after = len(self.model) // self.size
        assert self.chain.extend(tokens) == (range(before, after) if after > before else None)

    @rule(token=st.integers(0, 3))
    def append(self, token: int) -> None:
        self.model.append(token)
        completed = len(self.model) % self.size == 0
        expected = len(self.model) // self.size - 1 if completed else None
        assert self.chain.append(token) == expected

    @rule(count=st.integers(0, 80))
    def truncate(self, count: int) -> None:
        self.chain.truncate(count)
        del self.model[count:]

    @rule(count=st.integers(0, 30))
    def unwind(self, count: int) -> None:
        if count > len(self.model):
            with pytest.raises(ValueError, match=f"count={count} is not allowed"):
                self.chain.unwind(count)
        else:
            self.chain.unwind(count)
            del self.model[len(self.model) - count :]

    @rule()
    def pop(self) -> None:
        assert self.chain.pop() == (self.model.pop() if self.model else None)

    @rule(tokens=TOKENS)
    def update_with_another_list(self, tokens: list[int]) -> None:
        self.list = tokens
        self.model = list(tokens)
        assert self.chain.update(self.list) == len(self.model) // self.size

    @rule(tokens=TOKENS)
    def update_with_the_same_list_grown(self, tokens: list[int]) -> None:
        self.list += tokens
        self.model = list(self.list)
        assert self.chain.update(self.list) == len(self.model) // self.size

    @rule(keep=st.integers(0, 60), tokens=TOKENS)
    def update_with_the_same_list_edited_near_its_end(self, keep: int, tokens: list[int]) -> None:
        self.list[max(keep, len(self.list) - 40) :] = tokens
        self.model = list(self.list)
        assert self.chain.update(self.list) == len(self.model) // self.size

    @rule(tokens=TOKENS)
    def update_with_an_array(self, tokens: list[int]) -> None:
        self.model += tokens
        self.chain.update(np.array(self.model, dtype=np.uint32))

    @rule()
    def extend_with_something_wrong(self) -> None:
        with pytest.raises(TypeError, match="token 5 is None"):
            self.chain.extend([1, 2, 3, 4, 5, None])  # type: ignore[list-item]

    @rule()
    def update_with_something_wrong(self) -> None:
        wrong: list[Any] = [*self.model[:7], 1, 2, 3, 4, -1]
        with pytest.raises(ValueError, match=f"token {len(wrong) - 1} is -1"):
            self.chain.update(wrong)

    @invariant()
    def equals_a_chain_made_at_once(self) -> None:
        assert self.chain.tokens() == self.model
        assert self.chain.total_tokens == len(self.model)
        assert len(self.chain) == len(self.model) // self.size
        expected = reference(self.model, self.size, 77, IDENTITY, {1: b"e" * 32})
        assert state(self.chain) == expected


TestEdits = Edits.TestCase


def test_a_list_seen_again_is_neither_read_nor_hashed_again() -> None:
    hashed: list[bytes] = []

    def digest_function(message: bytes) -> bytes:
        hashed.append(message)
        return message[16:32]

    tokens: list[Any] = list(range(400))
    chain = TokenChain(4, 0, digest_function=digest_function)
    assert chain.update(tokens) == len(hashed) == 100
    tokens[0] = None  # would be an error if it were read again
    assert chain.update(tokens) == len(hashed) == 100
    tokens += [1, 2, 3, 4, 5]
    assert chain.update(tokens) == len(hashed) == 101
    assert hashed[-1][16:] == struct.pack("<4I", 1, 2, 3, 4)


def test_another_list_is_hashed_from_the_first_block_that_differs() -> None:
    hashed: list[bytes] = []

    def digest_function(message: bytes) -> bytes:
        hashed.append(message)
        return message[16:32]

    tokens = list(range(400))
    chain = TokenChain(4, 0, digest_function=digest_function)
    chain.update(tokens)
    hashed.clear()
    assert chain.update(list(tokens)) == 100
    assert not hashed
    assert chain.update([*tokens[:201], 9, *tokens[202:]]) == 100
    assert len(hashed) == 50


def test_an_edit_of_the_chain_makes_the_next_update_read_everything() -> None:
    tokens = list(range(200))
    chain = TokenChain(4, 0)
    chain.update(tokens)
    digests = chain.digests()
    chain.truncate(100)
    chain.extend([7] * 36 + tokens[136:])  # the last 64 tokens are the list's
    assert chain.digests() != digests
    chain.update(tokens)
    assert chain.digests() == digests


def test_a_list_edited_in_place_is_read_from_where_the_chain_was_truncated() -> None:
    tokens: list[Any] = list(range(400))
    chain = TokenChain(4, 0)
    chain.update(tokens)
    tokens[200:] = range(500, 900)
    chain.truncate(200)
    expected = TokenChain(4, 0)
    expected.update(tokens)
    tokens[0] = None  # would be an error if it were read again
    assert chain.update(tokens) == 150
    assert chain.digests() == expected.digests()


def test_digest_functions_see_digest_tokens_and_extra_keys() -> None:
    messages: list[bytes] = []

    def digest_function(message: bytes) -> bytes:
        messages.append(message)
        return bytes([len(messages)]) * 16

    chain = TokenChain(
        2, 0, identity=IDENTITY, extra={1: b"x" * 32}, digest_function=digest_function
    )
    chain.extend([1, 2, 3, 4])
    assert messages == [
        IDENTITY[16:] + struct.pack("<2I", 1, 2),
        b"\1" * 16 + struct.pack("<2I", 3, 4) + b"x" * 32,
    ]
    assert chain.digests() == b"\1" * 16 + b"\2" * 16


def test_a_digest_function_that_fails_leaves_the_chain_as_it_was() -> None:
    calls: list[bytes] = []

    def digest_function(message: bytes) -> bytes:
        calls.append(message)
        if len(calls) == 4:
            raise KeyError("no key")
        return message[:16] if len(calls) != 6 else b"short"

    chain = TokenChain(2, 0, digest_function=digest_function)
    chain.extend([1, 2, 3])
    with pytest.raises(KeyError):
        chain.extend([4, 5, 6, 7, 8])
    assert (chain.tokens(), len(chain)) == ([1, 2, 3], 1)
    with pytest.raises(ValueError, match="result of digest_function has 5 bytes: 16 are needed"):
        chain.extend([4, 5, 6])
    assert (chain.tokens(), len(chain)) == ([1, 2, 3], 1)


def test_external_sequence_hashes_are_kept_beside_the_chain() -> None:
    chain = TokenChain(2, 0)
    chain.extend([1, 2, 3, 4])
    chain.sync_external_sequence_hashes([100, 200])
    chain.extend([5, 6])
    chain.sync_external_sequence_hashes(iter([100, 200, 300]))
    assert chain.external_sequence_hashes() == [100, 200, 300]
    chain.unwind(3)
    assert chain.external_sequence_hashes() == [100]
    chain.update([1, 2, 9, 9])
    chain.sync_external_sequence_hashes([100, 201])
    assert chain.external_sequence_hashes() == [100, 201]


def test_external_sequence_hashes_that_do_not_fit_are_refused() -> None:
    chain = TokenChain(2, 0)
    chain.extend([1, 2, 3, 4])
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"{count} external sequence hashes for 2 complete"):
            chain.sync_external_sequence_hashes([1] * count)
    chain.sync_external_sequence_hashes([100, 200])
    with pytest.raises(ValueError, match="external sequence hash 1 is 201, it was 200 before"):
        chain.sync_external_sequence_hashes([100, 201])
    assert chain.external_sequence_hashes() == [100, 200]


@pytest.mark.parametrize("size", [0, -1, 65537])
def test_a_block_size_that_is_not_allowed_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size={size} is not allowed: use 1 to 65536"):
        TokenChain(size, 0)


def test_other_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="identity has 31 bytes: 32 are needed"):
        TokenChain(4, 0, identity=bytes(31))
    with pytest.raises(ValueError, match=r"extra\[3\] is b'short': 32 bytes are needed"):
        TokenChain(4, 0, extra={3: b"short"})
    with pytest.raises(OverflowError):
        TokenChain(4, 2**64)
    chain = TokenChain(4, 0)
    chain.extend([1, 2])
    with pytest.raises(ValueError, match="count=-1 is not allowed"):
        chain.truncate(-1)
    with pytest.raises(IndexError, match="tokens 1 to 3: the chain has 2"):
        chain.tokens(1, 3)
    with pytest.raises(IndexError, match="block 0: the chain has 0"):
        chain.block_hash(0)


def test_a_chain_knows_its_parameters() -> None:
    chain = TokenChain(16, 42)
    assert isinstance(chain, DigestChain)
    assert (chain.block_size, chain.salt_hash, chain.total_tokens, len(chain)) == (16, 42, 0, 0)


def test_salts_without_an_identity_have_chains_of_their_own() -> None:
    chains = [TokenChain(4, salt) for salt in (1, 2)]
    for chain in chains:
        chain.extend([1, 2, 3, 4])
    assert chains[0].digest(0) != chains[1].digest(0)
    assert chains[0].digest(0)[:8] != chains[0].digest(0)[8:]
