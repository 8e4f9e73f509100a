# SPDX-License-Identifier: Apache-2.0
"""What a policy of eviction is, and how a table gets the one that a setting names."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Protocol

from kvbm._fast.keys import Keys
from kvbm._fast.ranks import Uses
from kvbm._fast.table import BlockTable
from kvbm.errors import ConfigError
from kvbm.eviction.reuse import Reuse

__all__ = ["LRU", "POLICIES", "VARIABLE", "EvictionPolicy", "PolicyMaker", "evict_by", "policy_of"]

logger = logging.getLogger(__name__)

VARIABLE = "DYN_KVBM_EVICTION_POLICY"
LRU = "lru"


class EvictionPolicy(Protocol):
    """What tells a leader which of its blocks to evict first.

    Made with the `Uses` of the leader's table. It tells requests apart by classes, 0 to 255, and
    gives `Uses.set_ranks` a table of ranks by class and age whenever it likes; until then all ranks
    are 0, which is upstream's order. Class 0 stands for blocks of which nothing is known: those
    that were there before, or that another leader has used since.

    All calls come from the scheduler's thread: `arrive` must take microseconds. If it raises, it is
    not asked again, and the order is upstream's.
    """

    def arrive(self, use: int, keys: Keys, stop: int, hits: int) -> int:
        """Take note of a sequence that is looked up for the first time.

        Parameters
        ----------
        use : int
            Its number, by which `Uses.classify` can change its class later.
        keys : Keys
            Digests of its blocks.
        stop : int
            End of the blocks that were asked for.
        hits : int
            Blocks from the begin that need not be computed: on the device, or found now.

        Returns
        -------
        int
            The class of the blocks that it uses, now and later.
        """


PolicyMaker = Callable[[Uses], EvictionPolicy]

POLICIES: dict[str, PolicyMaker | None] = {LRU: None, "reuse": Reuse}
"""Those that come with kvbm; None is upstream's order, which the table has by itself."""


def policy_of(name: str, setting: str = VARIABLE) -> PolicyMaker | None:
    """What makes the policy of this name: one of `POLICIES`, or ``package.module:Class``.

    Parameters
    ----------
    name : str
        The name.
    setting : str
        What it was given by, for the error.

    Raises
    ------
    ConfigError
        There is no such policy, or its module cannot be imported.
    """
    if name in POLICIES:
        return POLICIES[name]
    module, _, attribute = name.partition(":")
    try:
        if not attribute:
            raise LookupError("not a policy of kvbm")
        made: PolicyMaker = getattr(importlib.import_module(module), attribute)
        if not callable(getattr(made, "arrive", None)):
            raise TypeError(f"{attribute} has no method arrive")
    except Exception as error:  # a module of somebody else may raise anything
        allowed = f"{', '.join(POLICIES)}, or package.module:Class of your own"
        raise ConfigError(
            f"{setting}={name!r} is not valid (allowed: {allowed}): {type(error).__name__}: {error}"
        ) from error
    return made


def evict_by(table: BlockTable, make: PolicyMaker | None) -> None:
    """Let a table evict by a policy from now on; None: in upstream's order."""
    if make is None:
        table.order_by(None)
        return
    uses = Uses(table.segment)
    try:
        table.order_by(make(uses), uses)
    except Exception:  # one of somebody else may raise anything
        logger.exception(
            "the eviction policy %s could not be made; the least recently returned goes first",
            getattr(make, "__name__", make),
        )
