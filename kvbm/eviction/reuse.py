# SPDX-License-Identifier: Apache-2.0
"""A policy that learns which requests are continued, and when.

A conversation, an agent or a document comes back with a longer prompt. How likely that is, and
when, differs by what is known when a request arrives: which turn it is, and how much of its prompt
is new. So a request's class is its turn with the logarithm of its new blocks. For each class the
policy learns, while it runs and with nothing given, the chance of being continued at each age (a
life table: kvbm/_fast/lifetimes.pyx). What a block is worth at an age is the best rate of hits for
the room it takes: the chance of being used within some time by the time it is expected to stay, for
the best such time. The least worth goes first, and what a later turn has left behind goes before
everything else.

What is learned is a hazard by age for first, second and later turns, and for each class a factor on
it, in turns (observed by expected continuations). Few observations count little: hazards are drawn
to that of all turns, factors to one. Age is counted in returned blocks. The past fades: counts are
halved every `HALVED_EVERY` requests.

Everything is done where a request is matched, on the scheduler's thread, in pieces: the time a
request is bounded, no thread is needed, and the same requests give the same decisions.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvbm._fast.keys import Keys
from kvbm._fast.lifetimes import Lifetimes, best_rates
from kvbm._fast.ranks import AGE_STARTS, AGES, USES_KNOWN, Uses

Floats = NDArray[np.float64]

TURNS, NEW = 5, 9
"""Classes: turns, and powers of two of new blocks; the last of each takes all that is more."""
COHORTS = 1 + TURNS * NEW
LEFT_BEHIND = COHORTS
"""Class of what a later turn did not use: it goes first."""
COMMON_PREFIX_FORKS = 4
"""Sequences that went on from the same block; from so many on it ends what prompts have in common.
"""
AGES_LEARNED = 26
"""Ages that are told apart, half octaves, from 1/64 of the table's blocks in returns on."""
LEARNED_EVERY, HALVED_EVERY = 100, 8192
"""Requests from one estimate to the next, and after which older ones count half."""
SHRINK = 100.0
"""Continuations after which half of what was observed is believed."""
PASSES = 4
LEVELS = 8
"""Ranks for a factor of two in worth."""
REMEMBERED_MIN, REMEMBERED_MAX = 1 << 16, 1 << 21
"""Blocks whose last use is known, cached or not: 16 times those of the table within these."""

_TURN_OF = np.arange(TURNS * NEW) // NEW
_STRATUM_OF = np.minimum(_TURN_OF, 2)
_OF_STRATUM = (np.arange(3)[:, None] == _STRATUM_OF).astype(np.float64)


def ages_of(blocks: int) -> slice:
    """Columns of a life table that are told apart for a table of so many blocks."""
    first = min((max(blocks // 64, 1).bit_length() - 1) * 2, AGES - AGES_LEARNED)
    return slice(first, first + AGES_LEARNED)


def widths_of(blocks: int) -> Floats:
    """Ticks of each of these ages; the first takes in all that are younger."""
    starts = [0.0, *AGE_STARTS[ages_of(blocks).start + 1 :], 2.0**32]
    return np.asarray(np.diff(starts[: AGES_LEARNED + 1]))


def hazards_of(reached: Floats, used: Floats, factor: Floats) -> Floats:
    """Continuations by stratum and age, for a class whose factor is 1; the last row: of all."""
    pooled = (used.sum(axis=0) + 1e-4) / (reached.sum(axis=0) + 1e-2)
    hazard = (_OF_STRATUM @ used + SHRINK * pooled) / (
        _OF_STRATUM @ (factor[:, None] * reached) + SHRINK
    )
    return np.concatenate([hazard, pooled[None]])


def next_factor(reached: Floats, used: Floats, factor: Floats) -> Floats:
    """Factors of all classes, nearer to what was observed."""
    expected = factor * (reached * hazards_of(reached, used, factor)[_STRATUM_OF]).sum(axis=1)
    log = np.log(factor) + np.log((used.sum(axis=1) + SHRINK) / (expected + SHRINK))
    weight = reached[:, 0] + 1e-9
    log -= (log @ weight) / weight.sum()
    return np.asarray(np.exp(np.clip(log, -3.0, 3.0)))


class Reuse:
    """The policy.

    Parameters
    ----------
    uses : Uses
        Of the table that it is for.
    """

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._blocks = uses.blocks
        remembered = min(max(16 * self._blocks, REMEMBERED_MIN), REMEMBERED_MAX)
        self._lifetimes = Lifetimes(uses, COHORTS, remembered)
        self._ages, self._widths = ages_of(self._blocks), widths_of(self._blocks)
        self._turn = bytearray(USES_KNOWN)  # by use, as the next
        self._length = array("I", bytes(4 * USES_KNOWN))
        self._arrived = 0
        self._estimate: Iterator[None] = iter(())
        self._rank(np.ones((COHORTS, AGES_LEARNED)))  # nothing is known: by their last return

    def arrive(self, use: int, keys: Keys, stop: int, hits: int) -> int:
        """Find out what a request continues, be that cached or not, and learn from it."""
        if stop <= 0:
            return 0
        lifetimes = self._lifetimes
        known, former, forks = lifetimes.trace_back(keys, hits, stop, use)
        turn = 0
        if former and use - former < USES_KNOWN:
            at = former % USES_KNOWN
            if self._goes_on(known, self._length[at], forks):
                turn = min(self._turn[at] + 1, TURNS - 1)
                lifetimes.used_again(former)
                self._uses.classify(former, LEFT_BEHIND)
        at = use % USES_KNOWN
        self._turn[at], self._length[at] = turn, stop
        cohort = 1 + turn * NEW + min((stop - known).bit_length(), NEW - 1)
        lifetimes.begin(use, cohort)
        lifetimes.count()
        self._arrived += 1
        if self._arrived % LEARNED_EVERY == 0:
            self._estimate = self._learn()
        next(self._estimate, None)
        return cohort

    @staticmethod
    def _goes_on(known: int, length: int, forks: int) -> bool:
        """Whether `known` blocks continue a request of `length` blocks.

        More than half of it, unless that is what many requests have in common; a repetition of all
        but its last block always does.
        """
        return 2 * known > length and (forks < COMMON_PREFIX_FORKS or known + 1 >= length)

    def _counts(self) -> tuple[Floats, Floats]:
        """Life table of all cohorts; the first age takes in all that are younger."""
        first = self._ages.start
        reached = self._lifetimes.reached[1:, self._ages].copy()
        used = self._lifetimes.used[1:, self._ages].copy()
        younger = self._lifetimes.used[1:, :first].sum(axis=1)
        reached[:, 0] += younger
        used[:, 0] += younger
        return reached, used

    def _learn(self) -> Iterator[None]:
        """Estimate anew from what is known now, a piece a request."""
        reached, used = self._counts()
        if self._arrived % HALVED_EVERY < LEARNED_EVERY:
            self._lifetimes.fade(0.5)
        factor = np.ones(TURNS * NEW)
        for _ in range(PASSES):
            factor = next_factor(reached, used, factor)
            yield
        hazard = hazards_of(reached, used, factor)
        rates = np.concatenate([hazard[-1:], hazard[_STRATUM_OF] * factor[:, None]])
        chance = np.minimum(-np.expm1(-rates), 0.999)
        yield
        worth = best_rates(chance, self._widths) * self._blocks
        yield
        self._rank(worth)
        yield

    def _rank(self, worth: Floats) -> None:
        """Give the classes ranks by what their blocks are worth at each age."""
        level = np.rint(LEVELS * (np.log2(np.maximum(worth, 1e-9)) + 20))
        of_age = np.clip(np.arange(AGES) - self._ages.start, 0, AGES_LEARNED - 1)
        ranks = np.zeros((COHORTS + 1, AGES), np.uint8)
        ranks[:COHORTS] = np.clip(level, 1, 255)[:, of_age]
        self._uses.set_ranks(ranks)
