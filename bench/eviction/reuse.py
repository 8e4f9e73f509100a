# SPDX-License-Identifier: Apache-2.0
"""When a chain will be used again: learned while it runs, from what can be known when it ends.

The hazard of being continued depends on the chain's age, separately for a first, second and later
turn, times factors for what the request was like: its turn with the number of its new blocks, and
the length of its answer. Factors are fitted in turns (observed / expected continuations), the rest
is Kaplan and Meier's estimate. The worth of a chain at an age is the best rate of hits for the room
it takes: the chance of being used within some time by the time it is expected to stay, for the best
such time (Gittins' index). Age is counted in returned blocks, the block table's own clock.

All state is bounded: the last `WINDOW` requests, and digests of the last `REMEMBERED` blocks, so
that a chain that comes back after its eviction is seen as what it is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.eviction.cache import Index
from kvbm._fast.lifetimes import best_rates
from kvbm.replay.trace import Trace

Floats = NDArray[np.float64]

EDGES = np.concatenate([[0.0], np.round(2.0 ** np.arange(7, 18.01, 0.5))])
STRATA = 3  # first, second, later turns
TURNS, NEW, ANSWERS = 5, 9, 11  # classes of the features; those of lengths by powers of two
LEVELS = np.linspace(-2.5, 2.5, 16)  # of a chain's log factor
PASSES = 4
SHRINK = 30.0  # a factor is believed after as many continuations
WINDOW = 16_384
REMEMBERED = 1 << 18
EVERY = 200  # requests from one estimate to the next
SUPERSEDED = -1.0


def worth_by_age(hazard: Floats) -> Floats:
    """Gittins' index for each row of hazards, at the begin of each bucket of age.

    Parameters
    ----------
    hazard : float64[rows, buckets]
        Chance of being used in a bucket, for what has not been used before it.
    """
    return np.asarray(best_rates(np.ascontiguousarray(hazard), np.diff(EDGES)))


class Seen(NamedTuple):
    """What is known of past chains, one entry a request."""

    stratum: Index
    bucket: Index  # of its age, at the end or now
    ended: NDArray[np.bool_]
    features: Index  # [requests, features]


def _hazard(seen: Seen, factor: Floats) -> Floats:
    """Hazard by stratum and bucket of a chain whose factor is 1."""
    shape = (STRATA, len(EDGES) - 1)
    hits, ends, cut = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    at = (seen.stratum, seen.bucket)
    np.add.at(ends, at, factor)
    np.add.at(hits, (seen.stratum[seen.ended], seen.bucket[seen.ended]), 1.0)
    np.add.at(cut, (seen.stratum[~seen.ended], seen.bucket[~seen.ended]), factor[~seen.ended])
    risk = np.cumsum(ends[:, ::-1], axis=1)[:, ::-1] - cut / 2
    pooled = (hits.sum(axis=0) + 1e-4) / (risk.sum(axis=0) + 1e-2)
    hazard: Floats = (hits + SHRINK * pooled) / (risk + SHRINK)
    return hazard


def fit(seen: Seen) -> tuple[Floats, list[Floats]]:
    """Hazards by stratum and bucket, and the log factors of each feature."""
    logs = [np.zeros(TURNS * NEW), np.zeros(ANSWERS)]
    columns = list(seen.features.T)

    def factor() -> Floats:
        of_features = [log[column] for log, column in zip(logs, columns, strict=True)]
        return np.asarray(np.exp(np.sum(of_features, axis=0)))

    for _ in range(PASSES):
        hazard = _hazard(seen, factor())
        passed = (np.cumsum(hazard, axis=1) - hazard / 2)[seen.stratum, seen.bucket]
        for log, column in zip(logs, columns, strict=True):
            observed = np.bincount(column[seen.ended], minlength=len(log))
            expected = np.bincount(column, factor() * passed, len(log))
            fitted = log + np.log((observed + SHRINK) / (expected + SHRINK))
            log[:] = np.clip(fitted - fitted[column].mean(), -3.0, 3.0)
            log[np.bincount(column, minlength=len(log)) == 0] = 0.0
    return _hazard(seen, factor()), logs


class Reuse:
    """An order that learns.

    Parameters
    ----------
    trace : Trace
        Where a request's lengths are looked up once it has arrived.
    taught : Reuse, optional
        One that has seen the whole trace: then its last estimate is used from the begin, which
        tells what knowing the true distribution would be worth.
    """

    def __init__(self, trace: Trace, taught: Reuse | None = None) -> None:
        count = len(trace.requests)
        self.requests = trace.requests
        self.clock = 0
        self.seen = 0
        self.last_user: OrderedDict[int, int] = OrderedDict()
        self.began = np.zeros(count, dtype=np.int64)
        self.ended_age = np.full(count, -1, dtype=np.int64)
        self.turn = np.zeros(count, dtype=np.int64)
        self.features = np.zeros((count, 2), dtype=np.int64)
        self.table: Floats | None = None
        self.logs: list[Floats] = []
        self.learns = taught is None
        if taught is not None:
            self.table, self.logs = taught.table, taught.logs

    def arrive(self, request: int, hits: int) -> None:
        """Find out which chain this continues, be it evicted or not, and learn from it."""
        blocks = self.requests[request].blocks
        known = hits
        while known < len(blocks) and blocks[known] in self.last_user:
            known += 1
        self.clock += len(blocks) - hits + 1
        if known >= 2:
            former = self.last_user.get(blocks[known - 1], -1)
            if former >= 0:
                self.turn[request] = self.turn[former] + 1
                if self.ended_age[former] < 0:
                    self.ended_age[former] = self.clock - self.began[former]
        for block in blocks[max(known - 1, 0) :]:
            self.last_user[block] = request
            self.last_user.move_to_end(block)
        while len(self.last_user) > REMEMBERED:
            self.last_user.popitem(last=False)
        self.began[request] = self.clock
        new = min(NEW - 1, (len(blocks) - known).bit_length())
        answer = min(ANSWERS - 1, self.requests[request].output_tokens.bit_length())
        self.features[request] = min(self.turn[request], TURNS - 1) * NEW + new, answer
        self.seen = request + 1
        if self.learns and self.seen % EVERY == 0:
            self.learn(WINDOW)

    def learn(self, window: int) -> None:
        """Estimate from the last `window` requests."""
        last = slice(max(0, self.seen - window), self.seen)
        ended = self.ended_age[last] >= 0
        age = np.where(ended, self.ended_age[last], self.clock - self.began[last])
        seen = Seen(
            np.minimum(self.turn[last], STRATA - 1),
            np.searchsorted(EDGES[1:-1], age, side="right"),
            ended,
            self.features[last],
        )
        hazard, self.logs = fit(seen)
        factors = np.exp(LEVELS)[:, None]
        rows = [worth_by_age(np.minimum(1 - np.exp(-row * factors), 0.999)) for row in hazard]
        self.table = np.stack(rows)

    def worth(self, requests: Index, superseded: NDArray[np.bool_]) -> Floats:
        """By class and age; nothing for what was superseded."""
        if self.table is None:
            return np.where(superseded, SUPERSEDED, requests.astype(np.float64))
        log = sum(of[self.features[requests, k]] for k, of in enumerate(self.logs))
        level = np.clip(np.rint((log - LEVELS[0]) / (LEVELS[1] - LEVELS[0])), 0, len(LEVELS) - 1)
        age = self.clock - self.began[requests]
        bucket = np.searchsorted(EDGES[1:-1], age, side="right")
        stratum = np.minimum(self.turn[requests], STRATA - 1)
        worth = self.table[stratum, level.astype(np.int64), bucket] + 1e-12 * requests
        return np.where(superseded, SUPERSEDED, worth)
