# SPDX-License-Identifier: Apache-2.0
"""The key of a block is what the tables have beside it, with salt, adapter and tokens before."""

from __future__ import annotations

import pytest

from kvbm.events.model import Stored
from kvbm.events.table_keys import ContentKeys, EngineKeys, TableKey
from kvbm.hashing import RequestKeys, token_chain

TOKENS = tuple(range(1, 13))


def chain(lora: str | None = None, salt: str | None = None) -> list[Stored]:
    """Three blocks of four tokens as vLLM tells of them; the salt is with the first alone."""
    blocks = []
    for number in range(3):
        keys = (lora,) if lora else ()
        if salt and number == 0:
            keys += (salt,)  # type: ignore[assignment]
        parent = 100 + number - 1 if number else None
        tokens = TOKENS[4 * number : 4 * number + 4]
        blocks.append(Stored(100 + number, parent, tokens, lora, "GPU", extra_keys=keys))
    return blocks


def content_keys(blocks: list[Stored]) -> list[int]:
    """Keys of a chain."""
    keys, found, last = ContentKeys(), [], None
    for block in blocks:
        last = keys.key(block, last)
        found.append(last.value)
    return found


@pytest.mark.parametrize(
    ("lora", "salt"), [(None, None), (None, "abc"), ("l1", None), ("l1", "abc"), ("abc", "abc")]
)
def test_content_keys_are_the_tables_sequence_hashes(lora: str | None, salt: str | None) -> None:
    expected = token_chain(4, RequestKeys(salt=salt, lora_name=lora))
    expected.extend(TOKENS)
    assert content_keys(chain(lora, salt)) == expected.sequence_hashes()


def test_salt_and_adapter_are_in_the_key_of_every_block() -> None:
    plain = content_keys(chain())
    # Upstream's own vector, so that the chain is its chain.
    assert plain == [8026409477313730465, 8178148779430958753, 9514044744703128477]
    for other in (chain("x"), chain(None, "x"), chain("x", "x")):
        assert not set(content_keys(other)) & set(plain)


@pytest.mark.parametrize("key", [("image", 3), ["image", 3], b"rows"])
def test_a_block_with_other_inputs_is_in_no_table_and_nor_is_what_follows(key: object) -> None:
    first, second, third = chain()
    second = second._replace(extra_keys=(key,))
    keys = content_keys([first, second, third])
    assert [value < 0 for value in keys] == [False, True, True]
    assert len(set(keys)) == 3


def test_a_block_behind_an_unknown_one_is_in_no_table() -> None:
    assert ContentKeys().key(chain()[1], None).value < 0


def test_the_engines_hash_is_the_key_where_it_is_the_tables() -> None:
    assert EngineKeys().key(chain()[1], None) == TableKey(101)
