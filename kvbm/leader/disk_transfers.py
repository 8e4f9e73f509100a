# SPDX-License-Identifier: Apache-2.0
"""What the leader's side of the disk tier keeps about chains and about transfers under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbm._fast.keys import Keys

__all__ = ["Candidate", "DiskFlow", "Promotion", "Transfer"]


@dataclass(frozen=True)
class DiskFlow:
    """Settings of the flow.

    Attributes
    ----------
    block_tokens, block_bytes : int
        Tokens of a block, and its bytes on all ranks together.
    filtered : bool
        Write a block only once it was used again.
    gb_per_day : float or None
        Write budget.
    """

    block_tokens: int
    block_bytes: int
    filtered: bool = True
    gb_per_day: float | None = None


@dataclass(eq=False)
class Candidate:
    """A chain some of whose blocks were used, to be looked at for blocks to write."""

    keys: Keys
    group: int
    used_from: int  # blocks from here on have not been counted yet
    upto: int


@dataclass(eq=False)
class Transfer:
    """Operations between host and disk, with what is held for them."""

    handles: list[int]
    blocks: int
    began: float
    host_ref: int | None = None
    disk_ref: int | None = None
    reserved: list[int] = field(default_factory=list)  # a spill's blocks in the disk table
    holds: int = 0  # a spill's chain up to its end: blocks that stay in the host tier
    keys: Keys | None = None
    group: int = 0
    first: int = 0  # a fetch's first block
    failed_at: int | None = None
    late: bool = False
    after: Transfer | None = None  # a fetch's predecessor in its chain: is collected before it


@dataclass(eq=False)
class Promotion:
    """Fetches that a request waits for."""

    fetches: list[Transfer]
