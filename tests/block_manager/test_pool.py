# SPDX-License-Identifier: Apache-2.0
"""A pool's rules: all or nothing, duplicates, eviction order, returns and reset."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvbm._fast.recovery import recover
from kvbm._fast.token_chain import TokenBlock
from kvbm.block_manager.block import Block, BlockState
from kvbm.block_manager.pool import BlockPool, BlockPoolStatus
from kvbm.errors import BlockError, BlockStateError, NotEnoughBlocks, ResetError
from kvbm.hashing import token_chain
from tests.fast.conftest import make_instance  # noqa: F401
from tests.fast.instances import Instance
from tests.leaks import wait_until

PAGE = 4
MakePool = Callable[..., BlockPool]


@pytest.fixture
def one(make_instance: Callable[..., Instance]) -> Instance:  # noqa: F811
    """A segment of eight slots."""
    return make_instance(host_slots=8)


@pytest.fixture
def make_pool(one: Instance) -> Iterator[MakePool]:
    """Make pools over the segment, closed at the end."""
    made: list[BlockPool] = []

    def make() -> BlockPool:
        made.append(BlockPool(one.leader(len(made) + 1), PAGE))
        return made[-1]

    yield make
    for pool in made:
        pool.close(force=True)


@pytest.fixture
def pool(make_pool: MakePool) -> BlockPool:
    """One pool of eight blocks."""
    return make_pool()


def blocks_of(count: int, seed: int = 0) -> list[TokenBlock]:
    """Return the token blocks of a sequence; the same seed, the same."""
    chain = token_chain(PAGE)
    chain.update(random.Random(seed).sample(range(100_000), count * PAGE))
    return chain.blocks()


def hashes_of(contents: Sequence[TokenBlock]) -> list[int]:
    """Return sequence hashes."""
    return [content.sequence_hash for content in contents]


def register(pool: BlockPool, contents: Sequence[TokenBlock], priority: int = 0) -> list[Block]:
    """Allocate blocks, fill them and register them."""
    blocks = pool.allocate_blocks(len(contents))
    for block, content in zip(blocks, contents, strict=True):
        block.apply_token_block(content)
        block.priority = priority
    return pool.register_blocks(blocks)


# ---- allocate ------------------------------------------------------------------------------------
def test_blocks_are_distinct_and_come_back(pool: BlockPool) -> None:
    blocks = pool.allocate_blocks(8)
    assert sorted(block.block_id for block in blocks) == list(range(8))
    assert {block.state for block in blocks} == {BlockState.RESET}
    assert pool.available_blocks == 0
    del blocks[2:]
    assert pool.available_blocks == 6
    blocks[0].release()
    assert (pool.available_blocks, pool.total_blocks) == (7, 8)


def test_an_allocation_takes_all_or_nothing(pool: BlockPool) -> None:
    held = pool.allocate_blocks(5)
    cached = blocks_of(2)
    register(pool, cached)
    with pytest.raises(NotEnoughBlocks) as caught:
        pool.allocate_blocks(4)
    assert (caught.value.requested, caught.value.available) == (4, 3)
    assert pool.status() == BlockPoolStatus(0, 2, 1)
    assert len(pool.allocate_blocks(3)) == 3
    assert len(held) == 5
    assert pool.match_sequence_hashes(hashes_of(cached)) == []


def test_no_blocks_and_a_negative_number(pool: BlockPool) -> None:
    assert pool.allocate_blocks(0) == []
    with pytest.raises(ValueError, match="count=-1"):
        pool.allocate_blocks(-1)


def test_empty_blocks_are_taken_before_cached_ones(pool: BlockPool) -> None:
    cached = blocks_of(3)
    register(pool, cached)
    blocks = pool.allocate_blocks(5)
    assert len(pool.match_sequence_hashes(hashes_of(cached))) == 3
    del blocks


# ---- register and match --------------------------------------------------------------------------
def test_registered_blocks_stay_cached_and_are_matched_in_order(pool: BlockPool) -> None:
    contents = blocks_of(4)
    blocks = register(pool, contents)
    places = [block.block_id for block in blocks]
    assert pool.status() == BlockPoolStatus(4, 0, 4)
    del blocks
    assert pool.status() == BlockPoolStatus(0, 4, 4)
    found = pool.match_sequence_hashes(hashes_of(contents))
    assert [block.block_id for block in found] == places
    assert [block.sequence_hash for block in found] == hashes_of(contents)
    assert [b.parent_sequence_hash for b in found] == [c.parent_sequence_hash for c in contents]
    assert {block.state for block in found} == {BlockState.REGISTERED}
    assert pool.status().active_blocks() == 4


def test_a_match_ends_at_the_first_block_that_is_not_there(pool: BlockPool) -> None:
    contents, others = blocks_of(4), blocks_of(2, 1)
    register(pool, contents[:3])
    register(pool, others)
    wanted = hashes_of([contents[0], others[0], contents[3], contents[1]])
    assert len(pool.match_sequence_hashes(wanted)) == 2
    assert pool.match_sequence_hashes([1, *wanted]) == []
    assert len(pool.match_token_blocks(contents)) == 3


def test_what_another_process_registered_is_found_by_its_tokens(make_pool: MakePool) -> None:
    ours, theirs = make_pool(), make_pool()
    contents = blocks_of(3)
    places = [block.block_id for block in register(theirs, contents)]
    assert ours.match_sequence_hashes(hashes_of(contents)) == []
    found = ours.match_token_blocks(contents)
    assert [block.block_id for block in found] == places
    assert len(ours.match_sequence_hashes(hashes_of(contents))) == 3


def test_a_duplicate_gets_the_block_that_is_there_and_frees_its_own(pool: BlockPool) -> None:
    contents = blocks_of(2)
    first = register(pool, contents)
    again = register(pool, contents)
    assert [b.block_id for b in again] == [b.block_id for b in first]
    assert pool.status() == BlockPoolStatus(2, 0, 6)
    del first
    assert pool.status() == BlockPoolStatus(2, 0, 6)
    del again
    revived = register(pool, contents)
    assert pool.status() == BlockPoolStatus(2, 0, 6)
    assert len(revived) == 2


def test_the_same_block_twice_in_one_call_is_registered_once(pool: BlockPool) -> None:
    content = blocks_of(1)[0]
    one, other = register(pool, [content, content])
    assert one.block_id == other.block_id
    assert pool.status() == BlockPoolStatus(1, 0, 7)


def test_only_complete_blocks_are_registered_and_nothing_else_happens(pool: BlockPool) -> None:
    complete, reset = pool.allocate_blocks(2)
    complete.apply_token_block(blocks_of(1)[0])
    with pytest.raises(BlockStateError, match="is reset, needed is complete"):
        pool.register_blocks([complete, reset])
    assert complete.state is BlockState.COMPLETE
    with pytest.raises(BlockError, match="no blocks to register"):
        pool.register_blocks([])
    assert pool.status() == BlockPoolStatus(0, 0, 6)


def test_a_block_of_another_pool_is_refused(make_pool: MakePool) -> None:
    ours, theirs = make_pool(), make_pool()
    (block,) = theirs.allocate_blocks(1)
    block.apply_token_block(blocks_of(1)[0])
    with pytest.raises(BlockError, match="belongs to another pool"):
        ours.register_blocks([block])


def test_a_block_whose_registration_failed_is_not_registered_under_another_name(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have stored a child below the first name meanwhile."""
    first, second = blocks_of(1)[0], blocks_of(1, seed=7)[0]
    (block,) = pool.allocate_blocks(1)
    block.apply_token_block(first)
    settled, calls = pool._settled, iter((True, False))
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_settled", lambda attempt: next(calls) and settled(attempt))
        with pytest.raises(BlockStateError, match="not publishable"):
            pool.register_blocks([block])
    block.reset()
    block.apply_token_block(second)
    with pytest.raises(BlockStateError, match="given another name"):
        pool.register_blocks([block])
    block.reset()
    block.apply_token_block(first)
    assert pool.register_blocks([block]) == [block]


def test_a_child_needs_its_parent(pool: BlockPool) -> None:
    contents = blocks_of(2)
    (block,) = pool.allocate_blocks(1)
    block.apply_token_block(contents[1])
    with pytest.raises(BlockStateError, match="which is not registered"):
        pool.register_blocks([block])
    assert block.state is BlockState.COMPLETE
    register(pool, contents[:1])
    assert pool.register_blocks([block]) == [block]
    assert len(pool.match_sequence_hashes(hashes_of(contents))) == 2


# ---- eviction ------------------------------------------------------------------------------------
def test_the_least_recently_returned_leaf_is_evicted_first(pool: BlockPool) -> None:
    old, new = blocks_of(4, 1), blocks_of(4, 2)
    register(pool, old)
    register(pool, new)
    taken = pool.allocate_blocks(3)
    assert len(pool.match_token_blocks(new)) == 4
    assert len(pool.match_token_blocks(old)) == 1
    assert len(taken) == 3


def test_touched_blocks_are_evicted_last(pool: BlockPool) -> None:
    old, new = blocks_of(4, 1), blocks_of(4, 2)
    register(pool, old)
    register(pool, new)
    assert pool.touch_blocks([*hashes_of(old), 7]) == 4
    taken = pool.allocate_blocks(3)
    assert len(pool.match_token_blocks(old)) == 4
    assert len(pool.match_token_blocks(new)) == 1
    assert len(taken) == 3
    assert pool.touch_blocks([7, *hashes_of(old)]) == 0


def test_a_lower_priority_is_evicted_first(pool: BlockPool) -> None:
    low, high = blocks_of(4, 1), blocks_of(4, 2)
    register(pool, high, 9)
    register(pool, low, 1)
    taken = pool.allocate_blocks(4)
    assert len(pool.match_token_blocks(high)) == 4
    assert pool.match_token_blocks(low) == []
    assert len(taken) == 4


def test_blocks_in_use_and_their_ancestors_are_never_evicted(pool: BlockPool) -> None:
    contents = blocks_of(4)
    register(pool, contents)
    last = pool.match_sequence_hashes(hashes_of(contents))[-1]
    with pytest.raises(NotEnoughBlocks):
        pool.allocate_blocks(5)
    assert pool.status() == BlockPoolStatus(4, 0, 4)
    assert last.sequence_hash == contents[3].sequence_hash


# ---- reset ---------------------------------------------------------------------------------------
def test_a_pool_in_use_is_not_reset(pool: BlockPool) -> None:
    contents = blocks_of(3)
    blocks = register(pool, contents)
    empty = pool.allocate_blocks(1)
    with pytest.raises(ResetError, match="total blocks: 8, available blocks: 4"):
        pool.reset()
    del blocks
    with pytest.raises(ResetError):
        pool.reset()
    assert len(pool.match_token_blocks(contents)) == 3
    del empty
    pool.reset()
    assert pool.status() == BlockPoolStatus(0, 0, 8)
    assert pool.match_token_blocks(contents) == []


def test_reset_blocks_says_what_became_of_each_hash(pool: BlockPool) -> None:
    free, used = blocks_of(3, 1), blocks_of(3, 2)
    register(pool, free)
    kept = register(pool, used)
    answer = pool.reset_blocks([free[1].sequence_hash, 77, used[0].sequence_hash])
    assert answer.reset_blocks() == [free[1].sequence_hash]
    assert answer.not_found_blocks() == [77]
    assert answer.not_reset_blocks() == [used[0].sequence_hash]
    assert pool.status() == BlockPoolStatus(3, 1, 4)
    assert len(pool.match_token_blocks(free)) == 1
    assert len(kept) == 3


# ---- returns and the end -------------------------------------------------------------------------
def test_a_return_inside_a_call_waits_for_its_end(pool: BlockPool) -> None:
    (block,) = pool.allocate_blocks(1)
    pool.enter()
    block.release()
    assert pool._live == 1
    pool.leave()
    assert pool._live == 0
    assert pool.available_blocks == 8


def test_a_closed_pool_gives_no_blocks_and_closes_after_its_last(one: Instance) -> None:
    closed = threading.Event()
    pool = BlockPool(one.leader(), PAGE, closed=closed.set)
    blocks = pool.allocate_blocks(2)
    pool.close()
    assert not closed.is_set()
    with pytest.raises(BlockError, match="closed"):
        pool.allocate_blocks(1)
    blocks.pop()
    assert not closed.is_set()
    blocks.pop()
    assert closed.is_set()
    pool.close()


def test_a_forced_close_returns_everything_at_once(one: Instance) -> None:
    pool = BlockPool(one.leader(), PAGE)
    blocks = register(pool, blocks_of(2)) + pool.allocate_blocks(2)
    pool.close(force=True)
    assert one.creator.free_blocks() == 6
    del blocks
    assert one.creator.free_blocks() == 6


def test_a_recovery_in_between_delays_a_call_and_fails_none(pool: BlockPool, one: Instance) -> None:
    done = threading.Event()

    def recover_again_and_again() -> None:
        while not done.is_set():
            recover(one.creator)

    thread = threading.Thread(target=recover_again_and_again, name="kvbm-recover")
    thread.start()
    try:
        for seed in range(200):
            contents = blocks_of(3, seed)
            assert len(register(pool, contents)) == 3
            assert len(pool.match_token_blocks(contents)) == 3
    finally:
        done.set()
        thread.join()
    assert pool.status().active_blocks() == 0


def test_threads_may_share_a_pool(pool: BlockPool) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(100):
                contents = blocks_of(2, 1000 * seed + turn % 5)
                blocks = register(pool, contents)
                found = pool.match_token_blocks(contents)
                assert [b.block_id for b in found] == [b.block_id for b in blocks]
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,), name=f"kvbm-work-{n}") for n in range(2)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: not any(t.is_alive() for t in threads), 60)
    assert failures == []
    assert pool.available_blocks == 8


def test_a_forked_child_returns_nothing_of_its_parent(pool: BlockPool) -> None:
    blocks = register(pool, blocks_of(2)) + pool.allocate_blocks(1)
    child = os.fork()
    if child == 0:
        try:
            del blocks
            pool.close(force=True)
            os._exit(0)
        except BaseException:  # noqa: BLE001
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert pool.status() == BlockPoolStatus(2, 0, 5)
    assert len(blocks) == 3
