# SPDX-License-Identifier: Apache-2.0
"""Blocks of a pool as Python objects: what is in them, and views of their memory by DLPack.

::

    RESET --init_sequence--> PARTIAL --commit, when full--> COMPLETE
    RESET --apply_token_block--> COMPLETE --BlockPool.register_blocks--> REGISTERED
    RESET, PARTIAL, COMPLETE --reset--> RESET

A `Block` owns its place in the pool. It goes back to the pool when neither the object nor one of
its layers nor a tensor made from them is left: a registered block stays cached and may be evicted
then, any other is empty again.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvbm._fast.dlpack import capsule
from kvbm._fast.token_chain import TokenBlock, TokenChain
from kvbm.errors import BlockStateError, GeometryError, TokenBlockError

if TYPE_CHECKING:
    from kvbm.block_manager.hold import Hold
    from kvbm.block_manager.memory import BlockMemory

__all__ = ["Block", "BlockList", "BlockState", "DlpackArgumentError", "Layer"]

Item = TypeVar("Item")


class BlockState(enum.Enum):
    """State of a block; what is in it."""

    RESET = "reset"
    PARTIAL = "partial"
    COMPLETE = "complete"
    REGISTERED = "registered"
    RELEASED = "released"
    """Not a state of a block: this object does not own one any more."""


class DlpackArgumentError(NotImplementedError, TypeError):
    """An argument of `__dlpack__` that is not supported.

    As a TypeError it makes NumPy and torch try again without the argument.
    """


def _refuse_arguments(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise DlpackArgumentError(
                f"__dlpack__({name}={value!r}) is not supported: allowed is None"
            )


class Cursor(Generic[Item]):
    """A list with one internal cursor: `iter` resets it. `to_list` is for concurrent use."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = list(items)
        self._next = 0

    def to_list(self) -> list[Item]:
        """Return the items as a new list."""
        return list(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self._items):
            raise IndexError(f"index {index} is outside 0..{len(self._items) - 1}")
        return self._items[index]

    def __iter__(self) -> Iterator[Item]:
        self._next = 0
        return self

    def __next__(self) -> Item:
        if self._next >= len(self._items):
            raise StopIteration
        self._next += 1
        return self._items[self._next - 1]


class Layer:
    """One layer of a block: ``[1, 1, outer_dim, page_size, inner_dim]`` by DLPack."""

    def __init__(self, hold: Hold, memory: BlockMemory, index: int) -> None:
        self._hold = hold
        self._memory = memory
        self.index = index

    def __dlpack__(
        self,
        stream: object = None,
        max_version: object = None,
        dl_device: object = None,
        copy: object = None,
    ) -> Any:
        """Return a capsule that shows the layer's memory and keeps the block.

        Raises
        ------
        NotImplementedError
            An argument is not None.
        """
        _refuse_arguments(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)
        shape = self._memory.shape
        return capsule(
            self._memory.layer_address(self._hold.slot, self.index),
            (1, 1, shape.outer_dim, shape.page_size, shape.inner_dim),
            shape.element.dlpack,
            self._memory.capsule_device,
            (self._hold, self._memory.owner),
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device type and number: (3, 0) pinned host, (2, device) CUDA."""
        return self._memory.dlpack_device


class Block(Cursor[Layer]):
    """One block of a pool; made by `BlockPool.allocate_blocks` and `BlockPool.match_*`.

    As a sequence it has its layers (none where the process does not have the memory).

    Attributes
    ----------
    priority : int
        Given to the block when it is registered: a lower one is evicted first.
    """

    def __init__(
        self, hold: Hold, page_size: int, memory: BlockMemory | None, token_block: TokenBlock | None
    ) -> None:
        layers = () if memory is None else range(memory.shape.num_layer)
        super().__init__(Layer(hold, memory, i) for i in layers)  # type: ignore[arg-type]
        self._hold: Hold | None = hold
        self._memory = memory
        self._slot = hold.slot
        self.page_size = page_size
        self.priority = 0
        self._chain: TokenChain | None = None
        self._token_block = token_block
        self._state = BlockState.RESET if token_block is None else BlockState.REGISTERED

    # ---- what it is ----------------------------------------------------------------------------
    @property
    def state(self) -> BlockState:
        """What is in it."""
        return self._state

    @property
    def block_id(self) -> int:
        """Number of its place in the pool, from 0."""
        return self._slot

    @property
    def num_tokens(self) -> int:
        """Tokens in it: 0 when reset, a page when complete or registered."""
        if self._chain is not None:
            return self._chain.total_tokens
        return 0 if self._token_block is None else self.page_size

    @property
    def token_block(self) -> TokenBlock | None:
        """Its tokens and hashes; None before it is complete."""
        return self._token_block

    @property
    def sequence_hash(self) -> int:
        """Its 64-bit sequence hash.

        Raises
        ------
        BlockStateError
            It is neither complete nor registered.
        """
        return self._complete().sequence_hash

    @property
    def parent_sequence_hash(self) -> int | None:
        """Sequence hash of the block before it; None for the first of a sequence.

        Raises
        ------
        BlockStateError
            It is neither complete nor registered.
        """
        return self._complete().parent_sequence_hash

    def _complete(self) -> TokenBlock:
        if self._token_block is None:
            raise BlockStateError(self._slot, self._state.value, "complete or registered")
        return self._token_block

    def _partial(self) -> TokenChain:
        if self._chain is None:
            raise BlockStateError(self._slot, self._state.value, BlockState.PARTIAL.value)
        return self._chain

    def _need_reset(self) -> None:
        if self._state is not BlockState.RESET:
            raise BlockStateError(self._slot, self._state.value, BlockState.RESET.value)

    # ---- filling -------------------------------------------------------------------------------
    def init_sequence(self, salt_hash: int) -> None:
        """Begin the first block of a sequence: RESET to PARTIAL.

        Parameters
        ----------
        salt_hash : int
            Seed of its hashes, 64 bits; `kvbm.hashing.salt_hash`.

        Raises
        ------
        BlockStateError
            It is not reset.
        """
        self._need_reset()
        self._chain = TokenChain(self.page_size, salt_hash)
        self._state = BlockState.PARTIAL

    def add_token(self, token: int) -> None:
        """Append a token.

        Raises
        ------
        BlockStateError
            It is not partial.
        TokenBlockError
            It is full.
        """
        self.add_tokens((token,))

    def add_tokens(self, tokens: Iterable[int]) -> list[int]:
        """Append as many tokens as fit; returns those that are left.

        Raises
        ------
        BlockStateError
            It is not partial.
        TokenBlockError
            It is full and there are tokens.
        """
        chain = self._partial()
        given = list(tokens)
        room = self.page_size - chain.total_tokens
        if given and room == 0:
            raise TokenBlockError("full", f"block {self._slot} has {self.page_size} tokens")
        chain.extend(given[:room])
        return given[room:]

    def pop_token(self) -> int:
        """Remove the last token and return it; errors as for `pop_tokens`."""
        chain = self._partial()
        last = chain.tokens()[-1:]
        self.pop_tokens(1)
        return last[0]

    def pop_tokens(self, count: int) -> None:
        """Remove the last tokens.

        Raises
        ------
        BlockStateError
            It is not partial.
        TokenBlockError
            There are none ("empty") or fewer ("insufficient tokens").
        """
        chain = self._partial()
        have = chain.total_tokens
        if count > 0 and have == 0:
            raise TokenBlockError("empty", f"block {self._slot} has no tokens")
        if count > have:
            raise TokenBlockError(
                "insufficient tokens", f"block {self._slot} has {have} tokens, not {count}"
            )
        chain.unwind(count)

    def commit(self) -> None:
        """End filling: PARTIAL to COMPLETE.

        Raises
        ------
        BlockStateError
            It is not partial.
        TokenBlockError
            Tokens are missing.
        """
        chain = self._partial()
        if chain.total_tokens != self.page_size:
            missing = self.page_size - chain.total_tokens
            raise TokenBlockError("incomplete", f"block {self._slot} lacks {missing} tokens")
        self._become_complete(chain.blocks()[0])

    def apply_token_block(self, token_block: TokenBlock) -> None:
        """Say what is in it in one go: RESET to COMPLETE.

        Parameters
        ----------
        token_block : TokenBlock
            From `kvbm.hashing.token_chain(...).blocks()`; its position in its sequence is free.

        Raises
        ------
        BlockStateError
            It is not reset.
        TokenBlockError
            The token block has another number of tokens.
        """
        self._need_reset()
        if len(token_block.tokens) != self.page_size:
            raise TokenBlockError(
                "size",
                f"block {self._slot} takes {self.page_size} tokens, not {len(token_block.tokens)}",
            )
        self._become_complete(token_block)

    def _become_complete(self, token_block: TokenBlock) -> None:
        self._chain = None
        self._token_block = token_block
        self._state = BlockState.COMPLETE

    def reset(self) -> None:
        """Forget what is in it: RESET, with priority 0.

        Raises
        ------
        BlockStateError
            It is registered, hence shared: let go of it, or ask the pool
            (`BlockPool.reset_blocks`).
        """
        if self._state in (BlockState.REGISTERED, BlockState.RELEASED):
            raise BlockStateError(self._slot, self._state.value, "reset, partial or complete")
        self._chain = self._token_block = None
        self._state = BlockState.RESET
        self.priority = 0

    # ---- for the pool --------------------------------------------------------------------------
    def hold(self) -> Hold:
        """What keeps its place in the pool.

        Raises
        ------
        BlockStateError
            It does not own a block any more.
        """
        if self._hold is None:
            raise BlockStateError(self._slot, self._state.value, "a block that is owned")
        return self._hold

    def become_registered(self) -> None:
        """COMPLETE to REGISTERED; called by the pool that has published it."""
        self._state = BlockState.REGISTERED

    def release(self) -> None:
        """Give the block back before this object goes away. May be called twice.

        Layers and tensors that were made from it keep its place until they are gone.
        """
        self._hold = self._memory = self._chain = None
        self._items = []
        self._state = BlockState.RELEASED

    # ---- DLPack --------------------------------------------------------------------------------
    def _view(self) -> tuple[Hold, BlockMemory]:
        hold = self.hold()
        if self._memory is None:
            raise GeometryError(
                f"block {self._slot}: this process does not have the memory of the block; managers "
                "that were made with the shape of a block (num_layer, ...) do"
            )
        return hold, self._memory

    def __dlpack__(
        self,
        stream: object = None,
        max_version: object = None,
        dl_device: object = None,
        copy: object = None,
    ) -> Any:
        """Return a capsule of ``[1, num_layer, outer_dim, page_size, inner_dim]``.

        It keeps the block.

        Raises
        ------
        NotImplementedError
            An argument is not None.
        GeometryError
            The memory is not in this process.
        """
        _refuse_arguments(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)
        hold, memory = self._view()
        return capsule(
            memory.block_address(hold.slot),
            (1, *memory.shape.axes),
            memory.shape.element.dlpack,
            memory.capsule_device,
            (hold, memory.owner),
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device type and number: (3, 0) pinned host, (2, device) CUDA."""
        return self._view()[1].dlpack_device


class BlockList(Cursor[Block]):
    """Blocks that were allocated together."""
