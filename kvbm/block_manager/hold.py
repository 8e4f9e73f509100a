# SPDX-License-Identifier: Apache-2.0
"""Ownership of one place in a pool."""

from typing import Protocol


class Owner(Protocol):
    """What a `Hold` needs of its pool."""

    def track(self, hold: "Hold") -> None:
        """Remember a new hold, weakly."""

    def give_back(self, ref: int, registered: bool) -> None:
        """Take the place back."""


class Hold:
    """One place in a pool, owned; goes back to the pool when the last reference to it is gone.

    Attributes
    ----------
    ref : int
        Reference in the block table.
    slot : int
        Number of the place.
    registered : bool
        Whether the block is to stay cached when it goes back.
    returned : bool
        Whether it went back already, at a forced close.
    named : bytes or None
        Digest under which others may have found it while it was being registered.
    """

    __slots__ = ("__weakref__", "named", "pool", "ref", "registered", "returned", "slot")

    def __init__(self, pool: Owner, ref: int, slot: int, registered: bool) -> None:
        self.pool = pool
        self.ref = ref
        self.slot = slot
        self.registered = registered
        self.returned = False
        self.named: bytes | None = None
        pool.track(self)

    def __del__(self) -> None:
        if not self.returned:
            self.pool.give_back(self.ref, self.registered)
