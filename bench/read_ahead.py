# SPDX-License-Identifier: Apache-2.0
"""What reading ahead along a chain would win: ``python -m bench.read_ahead TRACE``.

A look-up that ends in a block with a single continuation fetches a bounded piece of that from disk,
too, and the real tiers run with it (kvbm/replay/disk.py). Which block continues which is known from
the requests that have arrived so far; an engine would need a table of its own for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

from kvbm._fast.disk_table import DiskTable
from kvbm._fast.keys import Keys
from kvbm.leader.sequences import GroupBlocks, TrackedSequence
from kvbm.replay import trace as traces
from kvbm.replay.command import capacities
from kvbm.replay.disk import DiskRun, InstantOperations, replay_with_disk
from kvbm.replay.trace import Request, Trace

COUNTED = 1 << 40
"""More blocks than any chain has: a piece that is read ahead does not count as used."""


class Result(NamedTuple):
    """One run.

    Attributes
    ----------
    host, disk : float
        Hit rates of the two tiers, 0 to 1.
    read : int
        Blocks read from disk.
    ahead, useful : int
        Those read ahead, and those of them found in the host tier by a later request.
    """

    host: float
    disk: float
    read: int
    ahead: int
    useful: int


class ReadAheadRun(DiskRun):
    """A replay in which look-ups read ahead.

    Parameters
    ----------
    bound : int
        Most blocks of one piece; 0: none.
    only_after_disk : bool
        Only where the look-up itself brought blocks from disk.
    """

    def __init__(
        self,
        table: InstantOperations,
        disk: DiskTable,
        trace: Trace,
        filtered: bool,
        *,
        bound: int,
        only_after_disk: bool,
    ) -> None:
        super().__init__(table, disk, trace, filtered)
        self.bound = bound
        self.only_after_disk = only_after_disk
        self.ahead = self.useful = 0
        self._waiting: set[int] = set()
        self._after: dict[int, set[int]] = {}
        self._request: Request | None = None

    def request(self, number: int, request: Request, ends_s: float) -> None:
        """Let a request arrive; what follows what in it is known from then on."""
        self._request = request
        super().request(number, request, ends_s)
        blocks = [*request.blocks, *request.generated]
        for one, following in pairwise(blocks):
            self._after.setdefault(one, set()).add(following)

    def match(self, keys: Keys, blocks: int) -> tuple[int, int | None]:
        """Look up, then read ahead from where that ended."""
        assert self._request is not None
        ids = self._request.blocks
        there, ref = self.table.match(keys, 0, blocks)
        if ref is not None:
            self.table.unpin(ref)
        found_ahead = self._waiting & set(ids[:there])
        self.useful += len(found_ahead)
        self._waiting -= set(ids)
        found, deepest = super().match(keys, blocks)
        hits = min(found, blocks)
        if self.bound and hits and (hits > there or not self.only_after_disk):
            self._read_ahead(ids[:hits])
        return found, deepest

    def _read_ahead(self, prefix: Sequence[int]) -> None:
        piece = list(self._continuation(prefix[-1]))
        if not piece:
            return
        keys = Keys([self.digest[block] for block in chain(prefix, piece)])
        sequence = TrackedSequence("", [GroupBlocks(keys, used=COUNTED)])
        if not self.tier.promote(sequence, len(prefix), len(keys)):
            return
        while self.tier.is_promoting(sequence):
            pass
        there, ref = self.table.match(keys, 0, len(keys))
        if ref is not None:
            self.table.unpin(ref)
        self.ahead += max(0, there - len(prefix))
        self._waiting.update(piece[: max(0, there - len(prefix))])

    def _continuation(self, block: int) -> Iterator[int]:
        """Blocks after this one, as long as each has a single one after it."""
        for _ in range(self.bound):
            following = self._after.get(block, set())
            if len(following) != 1:
                return
            (block,) = following
            yield block


def measure(
    trace: Trace, host: int, disk: int, bound: int, *, filtered: bool, only_after_disk: bool
) -> Result:
    """Run a trace once."""
    made: list[ReadAheadRun] = []

    def make(*arguments: object) -> ReadAheadRun:
        build = partial(ReadAheadRun, bound=bound, only_after_disk=only_after_disk)
        made.append(build(*arguments))  # type: ignore[arg-type]
        return made[0]

    outcome = replay_with_disk(trace, host, disk, filtered=filtered, make=make)
    assert outcome.disk is not None
    on_disk = outcome.disk.hits
    return Result(
        (outcome.hits - on_disk) / outcome.references,
        on_disk / outcome.references,
        outcome.disk.read,
        made[0].ahead,
        made[0].useful,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.read_ahead", description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--host", type=capacities, default=[1000, 3000, 10000])
    parser.add_argument("--disk", type=capacities, default=[100_000])
    parser.add_argument("--blocks", type=capacities, default=[8, 32, 128])
    parser.add_argument("--after-disk", action="store_true", help="after disk hits alone")
    parser.add_argument("--unfiltered", action="store_true", help="every block is written")
    arguments = parser.parse_args(argv)
    trace = traces.read(arguments.trace)
    print("| host | disk | ahead at most | host hits % | disk hits % | read | ahead | of use |")
    print("|---|---|---|---|---|---|---|---|")
    for host in arguments.host:
        for disk in arguments.disk:
            for bound in (0, *arguments.blocks):
                found = measure(
                    trace,
                    host,
                    disk,
                    bound,
                    filtered=not arguments.unfiltered,
                    only_after_disk=arguments.after_disk,
                )
                use = f"{100 * found.useful / found.ahead:.1f} %" if found.ahead else "-"
                print(
                    f"| {host:,} | {disk:,} | {bound} | {100 * found.host:.2f} | "
                    f"{100 * found.disk:.2f} | {found.read:,} | {found.ahead:,} | {use} |"
                )


if __name__ == "__main__":
    main()
