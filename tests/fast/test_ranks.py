# SPDX-License-Identifier: Apache-2.0
"""Uses of blocks, their classes, and the ranks that a policy gives to these."""

from collections.abc import Callable

import numpy as np
import pytest

from kvbm._fast.keys import Keys
from kvbm._fast.ranks import AGE_STARTS, AGES, CLASSES, Uses
from tests.fast.instances import Instance, digests

Make = Callable[..., Instance]


def test_ages_are_half_octaves() -> None:
    assert len(AGE_STARTS) == AGES
    assert AGE_STARTS[:12] == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert AGE_STARTS[-1] == 3 << 30


@pytest.mark.parametrize("rank_class", [-1, CLASSES])
def test_a_class_that_there_is_not_is_refused(make_instance: Make, rank_class: int) -> None:
    uses = Uses(make_instance(4).leader().segment)
    with pytest.raises(ValueError, match=f"class {rank_class} is outside 0..255"):
        uses.classify(1, rank_class)


@pytest.mark.parametrize("shape", [(3, AGES - 1), (CLASSES + 1, AGES)])
def test_ranks_of_another_shape_are_refused(make_instance: Make, shape: tuple[int, int]) -> None:
    uses = Uses(make_instance(4).leader().segment)
    with pytest.raises(ValueError, match=f"ranks of shape {shape[0]} x {shape[1]}"):
        uses.set_ranks(np.zeros(shape, np.uint8))


def test_ranks_of_another_type_are_refused(make_instance: Make) -> None:
    uses = Uses(make_instance(4).leader().segment)
    with pytest.raises(ValueError, match="dtype"):
        uses.set_ranks(np.zeros((1, AGES), np.int64))  # type: ignore[arg-type]


def test_a_use_that_never_was_is_left_alone(make_instance: Make) -> None:
    uses = Uses(make_instance(4).leader().segment)
    uses.classify(5, 1)
    assert uses.last == 0


def test_without_a_policy_sequences_have_no_number(make_instance: Make) -> None:
    table = make_instance(4).leader()
    keys = Keys(digests(2))
    table.match(keys, 0, 2)
    assert keys.use == 0


def test_now_is_the_tick_of_the_latest_return(make_instance: Make) -> None:
    table = make_instance(4).leader()
    uses = Uses(table.segment)
    before = uses.now()
    ((ref, _),) = table.reserve(Keys(digests(1)), 0, 1)
    table.publish([ref])
    table.unpin(ref)
    assert uses.now() == before + 1
    assert uses.blocks == 4
