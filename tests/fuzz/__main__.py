# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz``: cases of these seeds, or those of a file; a JSON summary."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from tests.fuzz import cases
from tests.fuzz.cases import Case
from tests.fuzz.server import BATCH, Result, Server, shorter, walks_for


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first case")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seconds", type=float, help="end after this time")
    parser.add_argument(
        "--file", type=Path, help="cases to run, a line each, in place of those of seeds"
    )
    parser.add_argument("--failures", type=int, default=10, help="end after so many")
    parser.add_argument("--shorten", action="store_true", help="failed cases to as few steps as do")
    return parser.parse_args(arguments)


def wanted(asked: argparse.Namespace, server: Server) -> Iterator[Case]:
    """The cases that are asked for."""
    if asked.file is not None:
        for line in asked.file.read_text().splitlines():
            found = json.loads(line)  # of the corpus, or as a failure was printed
            yield Case.from_json(json.dumps(found.get("case", found)))
        return
    images = [*server.images.values()]
    for seed in islice(count(asked.seed), asked.cases):
        yield cases.make(seed, images, walks_for)


def main(arguments: Sequence[str]) -> int:
    """Run; 1 if a case has failed."""
    asked = parsed(arguments)
    total = Result()
    began = time.monotonic()
    with Server() as server:
        todo = wanted(asked, server)
        while batch := [*islice(todo, BATCH)]:
            found = server.run(batch)
            total.cases += found.cases
            total.outcomes += found.outcomes
            for failure in found.failures:
                case = shorter(server, failure) if asked.shorten else failure.case
                print(f"{failure.how}\n{case.to_json()[:20000]}", file=sys.stderr)
            total.failures += found.failures
            late = asked.seconds is not None and time.monotonic() - began > asked.seconds
            if late or len(total.failures) >= asked.failures:
                break
    print(
        json.dumps(
            {
                "cases": total.cases,
                "failures": [failure.how for failure in total.failures],
                "outcomes": dict(sorted(total.outcomes.items())),
            }
        )
    )
    return int(bool(total.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
