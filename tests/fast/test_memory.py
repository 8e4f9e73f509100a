# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvbm._fast.memory import populate

PAGE = 4096
COUNT = 64 * PAGE


def allocated(descriptor: int) -> int:
    """Bytes of an object that have memory."""
    return os.fstat(descriptor).st_blocks * 512


def test_populated_pages_have_memory_and_others_do_not() -> None:
    descriptor = os.memfd_create("kvbm-test")
    os.ftruncate(descriptor, COUNT)
    memory = mmap.mmap(descriptor, COUNT)
    assert populate(memory, 8 * PAGE, 16 * PAGE) == 0
    assert allocated(descriptor) == 16 * PAGE
    memory.close()
    os.close(descriptor)


def test_several_threads_populate_one_mapping_and_keep_what_is_there() -> None:
    memory = mmap.mmap(-1, COUNT)
    memory[:5] = b"bytes"
    with ThreadPoolExecutor(4) as pool:
        starts = range(0, COUNT, 4 * PAGE)
        problems = list(pool.map(lambda at: populate(memory, at, 4 * PAGE), starts))
    assert set(problems) == {0}
    assert memory[:5] == b"bytes"
    memory.close()


@pytest.mark.parametrize(("offset", "count"), [(-PAGE, PAGE), (0, COUNT + 1), (COUNT, 1)])
def test_a_piece_outside_of_the_mapping_is_refused(offset: int, count: int) -> None:
    memory = mmap.mmap(-1, COUNT)
    with pytest.raises(ValueError, match="outside"):
        populate(memory, offset, count)
    memory.close()


def test_a_read_only_buffer_is_refused() -> None:
    with pytest.raises(BufferError):
        populate(bytes(PAGE), 0, PAGE)
