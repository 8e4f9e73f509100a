# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.eviction TRACE --capacity 1k,10k``: orders of eviction on trial, as Markdown.

Hit rates in percent: least recently used; an order that learns which chains are used again
(bench/eviction/reuse.py); the same with the estimate of the whole trace known from the begin; the
optimum. With ``--bounds``, what no order exceeds that knows a block's age and only the classes
named, with ages of eviction chosen in hindsight, and what is left when they are chosen on one half
of the conversations and tried on the other (bench/eviction/bound.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.eviction.bound import bound, held_out, stays
from bench.eviction.cache import LeastRecent, hits_of
from bench.eviction.reuse import Reuse
from kvbm.replay.command import capacities
from kvbm.replay.policies import optimum_hits
from kvbm.replay.trace import Trace, read


def row(trace: Trace, capacity: int) -> list[int]:
    """Hits of each order."""
    learning = Reuse(trace)
    learned = hits_of(trace, capacity, learning)
    learning.learn(len(trace.requests))
    return [
        hits_of(trace, capacity, LeastRecent()),
        learned,
        hits_of(trace, capacity, Reuse(trace, taught=learning)),
        optimum_hits(trace, capacity),
    ]


def _print(names: list[str]) -> None:
    print("| blocks | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.eviction", description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--capacity", type=capacities, required=True, metavar="BLOCKS,...")
    parser.add_argument("--bounds", action="store_true")
    arguments = parser.parse_args(argv)
    trace = read(arguments.trace)
    _print(["LRU", "learned", "taught", "optimum"])
    for capacity in arguments.capacity:
        rates = (f"{100 * hits / trace.references:.1f}" for hits in row(trace, capacity))
        print(f"| {capacity:,} | " + " | ".join(rates) + " |", flush=True)
    if arguments.bounds:
        of = stays(trace)
        for title, compute in (("bound", bound), ("held out", held_out)):
            print(f"\n{title}, by what is known of a block beside its age\n")
            _print(list(of.classes))
            for capacity in arguments.capacity:
                hits = [compute(of, name, capacity) for name in of.classes]
                rates = (f"{100 * of_class / trace.references:.1f}" for of_class in hits)
                print(f"| {capacity:,} | " + " | ".join(rates) + " |", flush=True)


if __name__ == "__main__":
    main()
