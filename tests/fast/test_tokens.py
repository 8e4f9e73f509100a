# SPDX-License-Identifier: Apache-2.0
"""Token ids are read out of lists and buffers exactly; what is no token is named."""

import array
import enum
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvbm._fast.tokens import pack_tokens

TOKENS = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 300), max_size=200)
TOKEN_MAX = 2**32 - 1


def packed(values: Sequence[int]) -> bytes:
    """Return u32 little-endian bytes, the slow way."""
    return struct.pack(f"<{len(values)}I", *values)


@given(TOKENS)
@example([0, 2**15, 2**30 - 1, 2**30, 2**31, TOKEN_MAX])
def test_lists_tuples_and_iterators_are_read_exactly(tokens: list[int]) -> None:
    for source in (tokens, tuple(tokens), iter(tokens)):
        assert pack_tokens(source) == packed(tokens)


@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "u8", "i8", "longlong", "ulonglong"])
def test_integer_arrays_are_read_exactly(dtype: str) -> None:
    info = np.iinfo(dtype)
    values = [0, 1, 257, 32767, min(info.max, TOKEN_MAX), *range(100)]
    source = np.array(values, dtype=dtype)
    assert pack_tokens(source) == packed(values)
    assert pack_tokens(source[3:50]) == packed(values[3:50])
    source.setflags(write=False)
    assert pack_tokens(memoryview(source)) == packed(values)


def test_arrays_of_the_standard_library_are_read() -> None:
    assert pack_tokens(array.array("I", [1, 2, TOKEN_MAX])) == packed([1, 2, TOKEN_MAX])
    assert pack_tokens(array.array("q", [5])) == packed([5])
    assert pack_tokens(array.array("q", [])) == b""


def test_objects_that_are_integers_are_read() -> None:
    class Token(enum.IntEnum):
        BOS = 2

    tokens: list[Any] = [np.int64(7), np.uint32(8), True, Token.BOS, 2**31]
    assert pack_tokens(tokens) == packed([7, 8, 1, 2, 2**31])


@pytest.mark.parametrize("index", [0, 1, 15, 16, 17, 40, 99])
@pytest.mark.parametrize("bad", [-1, 2**32, 2**64, -(2**70), np.int64(-5)])
def test_a_token_out_of_range_is_named(index: int, bad: int) -> None:
    tokens = list(range(100))
    tokens[index] = bad
    with pytest.raises(ValueError, match=rf"token {index} is {int(bad)}: 0 to 4294967295 are"):
        pack_tokens(tokens)


@pytest.mark.parametrize("bad", [None, 1.5, "3", b"x", [1]])
def test_a_token_that_is_no_integer_is_named(bad: object) -> None:
    with pytest.raises(TypeError, match=r"token 3 is .*: integers are needed"):
        pack_tokens([0, 1, 2, bad])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (np.array([3, -1], dtype=np.int16), -1),
        (np.array([3, -2], dtype=np.int32), -2),
        (np.array([3, -3], dtype=np.int64), -3),
        (np.array([3, 2**32], dtype=np.int64), 2**32),
        (np.array([3, 2**64 - 1], dtype=np.uint64), 2**64 - 1),
    ],
)
def test_a_bad_value_in_an_array_is_named(source: Any, value: int) -> None:
    with pytest.raises(ValueError, match=rf"token 1 is {value}: 0 to 4294967295 are allowed"):
        pack_tokens(source)


@pytest.mark.parametrize(
    "source",
    [
        b"\1\0\0\0",
        np.zeros(4, dtype=np.float32),
        np.zeros(4, dtype=np.bool_),
        np.zeros(4, dtype=">i4"),
        np.zeros((2, 2), dtype=np.int32),
    ],
)
def test_buffers_that_are_no_row_of_integers_are_refused(source: Any) -> None:
    with pytest.raises(TypeError, match="one dimension of 2-, 4- or 8-byte integers is needed"):
        pack_tokens(source)


def test_a_strided_array_is_refused() -> None:
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        pack_tokens(np.arange(10)[::2])


def test_a_list_that_shrinks_while_it_is_read_is_noticed() -> None:
    tokens: list[Any] = list(range(100))

    class Odd:
        def __index__(self) -> int:
            del tokens[50:]
            return 7

    tokens[20] = Odd()
    with pytest.raises(RuntimeError, match="became shorter while it was read"):
        pack_tokens(tokens)
