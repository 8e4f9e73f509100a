# SPDX-License-Identifier: Apache-2.0
"""States of a block, views of its memory by DLPack, and lists with one cursor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from kvbm.block_manager import BlockManager
from kvbm.block_manager.block import Block, BlockList, BlockState
from kvbm.errors import BlockStateError, ConfigError, GeometryError, TokenBlockError
from kvbm.hashing import salt_hash, token_chain

PAGE = 4
SHAPE = (3, 2, PAGE, 8)
SALT = salt_hash()


def manager_of(dtype: str | None = "fp16", host: int | None = 6) -> BlockManager:
    """Make a manager of small blocks."""
    return BlockManager(0, 3, 2, PAGE, 8, dtype, host)


@pytest.fixture
def manager() -> Iterator[BlockManager]:
    """A manager with six host blocks."""
    made = manager_of()
    yield made
    made.close()


@pytest.fixture
def block(manager: BlockManager) -> Iterator[Block]:
    """One block, reset."""
    made = manager.allocate_host_blocks_blocking(1)[0]
    yield made
    made.release()


def writable(exporter: object) -> np.ndarray[Any, Any]:
    """Return a writable view: NumPy's own of such a capsule is read-only."""
    torch = pytest.importorskip("torch")
    return cast("np.ndarray[Any, Any]", torch.from_dlpack(exporter).numpy())


# ---- states --------------------------------------------------------------------------------------
def test_a_block_is_filled_committed_and_reset(block: Block) -> None:
    assert (block.state, block.num_tokens) == (BlockState.RESET, 0)
    block.init_sequence(SALT)
    block.add_token(1)
    assert block.add_tokens([2, 3, 4, 5, 6]) == [5, 6]
    assert (block.state, block.num_tokens) == (BlockState.PARTIAL, PAGE)
    assert block.pop_token() == 4
    block.pop_tokens(2)
    assert block.num_tokens == 1
    assert block.add_tokens([7, 8, 9]) == []
    block.commit()
    assert (block.state, block.num_tokens) == (BlockState.COMPLETE, PAGE)
    chain = token_chain(PAGE)
    chain.update([1, 7, 8, 9])
    assert block.token_block is not None
    assert block.token_block.tokens == (1, 7, 8, 9)
    assert block.sequence_hash == chain.sequence_hash(0)
    assert block.parent_sequence_hash is None
    block.priority = 5
    block.reset()
    assert (block.state, block.num_tokens, block.priority) == (BlockState.RESET, 0, 0)


def test_a_token_block_is_applied_with_its_place_in_the_sequence(block: Block) -> None:
    chain = token_chain(PAGE)
    chain.update(range(2 * PAGE))
    block.apply_token_block(chain.blocks()[1])
    assert block.state is BlockState.COMPLETE
    assert block.sequence_hash == chain.sequence_hash(1)
    assert block.parent_sequence_hash == chain.sequence_hash(0)


def put_into(block: Block, state: BlockState) -> None:
    """Bring a reset block into a state."""
    if state is not BlockState.RESET:
        block.init_sequence(SALT)
    if state is BlockState.COMPLETE:
        block.add_tokens(range(PAGE))
        block.commit()


CALLS: dict[str, tuple[Any, set[BlockState]]] = {
    "init_sequence": (lambda b: b.init_sequence(SALT), {BlockState.RESET}),
    "apply": (
        lambda b: b.apply_token_block(chain_of(PAGE).blocks()[0]),
        {BlockState.RESET},
    ),
    "add_token": (lambda b: b.add_token(1), {BlockState.PARTIAL}),
    "add_tokens": (lambda b: b.add_tokens([1]), {BlockState.PARTIAL}),
    "pop_token": (lambda b: b.pop_token(), {BlockState.PARTIAL}),
    "pop_tokens": (lambda b: b.pop_tokens(1), {BlockState.PARTIAL}),
    "commit": (lambda b: b.commit(), {BlockState.PARTIAL}),
    "sequence_hash": (lambda b: b.sequence_hash, {BlockState.COMPLETE}),
    "parent_sequence_hash": (lambda b: b.parent_sequence_hash, {BlockState.COMPLETE}),
}


def chain_of(tokens: int) -> Any:
    """Return the chain of so many tokens."""
    chain = token_chain(PAGE)
    chain.update(range(tokens))
    return chain


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", [BlockState.RESET, BlockState.PARTIAL, BlockState.COMPLETE])
def test_a_call_that_the_state_does_not_allow_is_refused(
    block: Block, call: str, state: BlockState
) -> None:
    put_into(block, state)
    run, allowed = CALLS[call]
    if state in allowed:
        try:
            run(block)
        except TokenBlockError:
            assert state is BlockState.PARTIAL
    else:
        with pytest.raises(BlockStateError, match=f"is {state.value}, needed is"):
            run(block)
        assert block.state is state


@pytest.mark.parametrize(
    ("tokens", "call", "kind"),
    [
        (PAGE, lambda b: b.add_token(1), "full"),
        (PAGE, lambda b: b.add_tokens([1]), "full"),
        (0, lambda b: b.pop_token(), "empty"),
        (2, lambda b: b.pop_tokens(3), "insufficient tokens"),
        (PAGE - 1, lambda b: b.commit(), "incomplete"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_by_kind(
    block: Block, tokens: int, call: Any, kind: str
) -> None:
    block.init_sequence(SALT)
    block.add_tokens(range(tokens))
    with pytest.raises(TokenBlockError) as caught:
        call(block)
    assert caught.value.kind == kind
    assert block.num_tokens == tokens


def test_a_token_block_of_another_size_is_refused(block: Block) -> None:
    chain = token_chain(PAGE + 1)
    chain.update(range(PAGE + 1))
    with pytest.raises(TokenBlockError, match="takes 4 tokens, not 5"):
        block.apply_token_block(chain.blocks()[0])


def test_a_registered_block_is_shared_and_cannot_be_reset(
    manager: BlockManager, block: Block
) -> None:
    put_into(block, BlockState.COMPLETE)
    (registered,) = manager.host_pool.register_blocks([block])
    assert registered is block
    assert (block.state, block.num_tokens) == (BlockState.REGISTERED, PAGE)
    for call in (block.reset, lambda: block.init_sequence(SALT), block.commit):
        with pytest.raises(BlockStateError, match="registered"):
            call()


def test_a_released_block_says_so(block: Block) -> None:
    block.release()
    block.release()
    assert block.state is BlockState.RELEASED
    with pytest.raises(BlockStateError, match="released"):
        block.init_sequence(SALT)
    with pytest.raises(BlockStateError, match="released"):
        np.from_dlpack(block)


# ---- DLPack --------------------------------------------------------------------------------------
def test_a_block_and_its_layers_are_views_of_the_same_memory(block: Block) -> None:
    whole = writable(block)
    assert whole.shape == (1, *SHAPE)
    whole[...] = np.arange(whole.size).reshape(whole.shape)
    assert len(block) == 3
    for index in range(3):
        layer = np.from_dlpack(block[index])
        assert layer.shape == (1, 1, *SHAPE[1:])
        assert (layer[0, 0] == whole[0, index]).all()


def test_blocks_do_not_overlap(manager: BlockManager) -> None:
    views = [writable(b) for b in manager.allocate_host_blocks_blocking(6)]
    for number, view in enumerate(views):
        view[...] = number
    assert [set(view.ravel().tolist()) for view in views] == [{float(i)} for i in range(6)]


def test_host_blocks_are_pinned_memory_to_dlpack_and_cpu_to_its_consumers(block: Block) -> None:
    assert block.__dlpack_device__() == block[0].__dlpack_device__() == (3, 0)
    assert np.from_dlpack(block).nbytes == 2 * 3 * 2 * PAGE * 8


@pytest.mark.parametrize("argument", ["stream", "max_version", "dl_device", "copy"])
def test_arguments_of_dlpack_are_not_implemented(block: Block, argument: str) -> None:
    for exporter in (block, block[0]):
        with pytest.raises(NotImplementedError, match=argument):
            exporter.__dlpack__(**{argument: (1, 0)})
        assert exporter.__dlpack__(**{argument: None}) is not None


@pytest.mark.parametrize(
    ("dtype", "seen"),
    [
        (None, "float16"),
        ("fp16", "float16"),
        ("FP32", "float32"),
        ("fp64", "float64"),
        ("fp8", "uint8"),
        ("u8", "uint8"),
        ("i8", "int8"),
        ("u16", "uint16"),
        ("i64", "int64"),
    ],
)
def test_element_types_are_those_of_their_names_and_fp8_is_bytes(
    dtype: str | None, seen: str
) -> None:
    manager = manager_of(dtype, 2)
    view = np.from_dlpack(manager.allocate_host_blocks_blocking(1)[0])
    assert view.dtype.name == seen
    del view
    manager.close()


def test_torch_takes_blocks_and_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    manager = manager_of("bf16", 2)
    block = manager.allocate_host_blocks_blocking(1)[0]
    tensor = torch.from_dlpack(block)
    assert (tensor.shape, tensor.dtype) == ((1, *SHAPE), torch.bfloat16)
    tensor.fill_(3)
    assert (torch.from_dlpack(block[2]) == 3).all()
    del tensor
    manager.close()


def test_an_unknown_element_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"dtype='fp4' is not valid \(allowed: fp8, fp16"):
        manager_of("fp4")


def test_a_tensor_keeps_its_block_and_the_memory(manager: BlockManager) -> None:
    blocks = manager.allocate_host_blocks_blocking(6)
    layer = writable(blocks[3][1])
    layer[...] = 7
    del blocks
    assert manager.host_pool.available_blocks == 5
    manager.close()
    assert (layer == 7).all()


def test_blocks_without_memory_here_have_no_layers() -> None:
    from kvbm.block_manager.manager import _device_pool
    from kvbm.config import load_settings

    pool = _device_pool(load_settings({}, {}), 2, PAGE, None)
    (block,) = pool.allocate_blocks(1)
    assert (len(block), block.to_list()) == (0, [])
    with pytest.raises(GeometryError, match="does not have the memory"):
        block.__dlpack__()
    del block
    pool.close()


# ---- lists ---------------------------------------------------------------------------------------
def test_a_list_has_length_items_and_one_cursor(manager: BlockManager) -> None:
    blocks = manager.allocate_host_blocks_blocking(3)
    assert isinstance(blocks, BlockList)
    assert len(blocks) == 3
    assert [b.block_id for b in blocks] == [b.block_id for b in blocks.to_list()]
    first = iter(blocks)
    assert next(first) is blocks[0]
    assert next(blocks) is blocks[1]
    assert next(iter(blocks)) is blocks[0]
    assert next(first) is blocks[1]
    assert next(blocks) is blocks[2]
    with pytest.raises(StopIteration):
        next(blocks)
    assert blocks.to_list() is not blocks.to_list()


@pytest.mark.parametrize("index", [-1, 3, 10])
def test_an_index_outside_is_refused(manager: BlockManager, index: int) -> None:
    blocks = manager.allocate_host_blocks_blocking(3)
    with pytest.raises(IndexError, match=r"outside 0\.\.2"):
        blocks[index]
    with pytest.raises(IndexError):
        blocks[0][index]
