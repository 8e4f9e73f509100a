# SPDX-License-Identifier: Apache-2.0
"""The command line of the replay.

::

    python -m kvbm.replay run TRACE --capacity 1000,3000,10000
    python -m kvbm.replay run TRACE --capacity 1k,10k,100k --token-bytes 131072 --plot hits.svg
    python -m kvbm.replay run TRACE --capacity 10k --disk 100k
    python -m kvbm.replay run TRACE --capacity 10k --policy reuse
    python -m kvbm.replay run TRACE --capacity 10k --json
    python -m kvbm.replay make FILE --requests 5000 --seed 1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kvbm.errors import ConfigError, KvbmError
from kvbm.eviction.policy import LRU, POLICIES, PolicyMaker, policy_of
from kvbm.replay import synthetic, trace
from kvbm.replay.disk import replay_with_disk
from kvbm.replay.manager import CAPACITY_MAX, Outcome, Pace, replay
from kvbm.replay.policies import POLICIES as YARDSTICKS

UNITS = {"k": 1_000, "m": 1_000_000}
LIBRARIES = ("rich", "matplotlib")


def capacities(text: str) -> list[int]:
    """Read ``1k,3000,1m``: sizes in blocks, rising."""
    sizes = set()
    for word in text.lower().split(","):
        number, unit = (word[:-1], UNITS[word[-1]]) if word[-1:] in UNITS else (word, 1)
        try:
            size = int(float(number) * unit)
        except (ValueError, OverflowError):
            size = 0
        if not 1 <= size <= CAPACITY_MAX:
            raise argparse.ArgumentTypeError(
                f"{word!r} is not a number of blocks (1 to {CAPACITY_MAX}, for example 3000 or 10k)"
            )
        sizes.add(size)
    return sorted(sizes)


def _blocks(text: str) -> int:
    """Read one size in blocks."""
    sizes = capacities(text)
    if len(sizes) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one number of blocks")
    return sizes[0]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvbm.replay",
        description="Run a request trace through the block table, to size a tier before buying it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="hit rates of a trace at some capacities")
    run.add_argument(
        "trace", type=Path, metavar="TRACE", help="file: Mooncake's JSON lines, or a record of kvbm"
    )
    run.add_argument(
        "--capacity",
        type=capacities,
        required=True,
        metavar="BLOCKS,...",
        help="sizes of the host tier in blocks of the trace: 3000 or 10k or 1m",
    )
    run.add_argument(
        "--disk", type=_blocks, metavar="BLOCKS", help="size of a disk tier below each of them"
    )
    run.add_argument(
        "--no-disk-filter",
        action="store_true",
        help="write a block to disk the first time it is seen, not the second",
    )
    run.add_argument(
        "--policy",
        default=LRU,
        metavar="NAME",
        help=f"how the host tier evicts: {', '.join(POLICIES)}, or package.module:Class of your "
        f"own; by default {LRU}",
    )
    run.add_argument("--prefill-tokens-s", type=_not_negative, default=0.0, metavar="N")
    run.add_argument(
        "--decode-ms",
        type=_not_negative,
        default=0.0,
        metavar="MS",
        help="with --prefill-tokens-s: requests hold their blocks that long; by default each has "
        "ended when the next one arrives",
    )
    run.add_argument(
        "--token-bytes", type=_positive, metavar="N", help="KV bytes a token, all ranks: adds GB"
    )
    run.add_argument("--alone", action="store_true", help="no other policies")
    run.add_argument("--plot", type=Path, metavar="FILE", help="picture: .svg, .png or .pdf")
    run.add_argument("--json", action="store_true", help="print JSON instead of tables")
    make = commands.add_parser("make", help="make a trace of conversations from a seed")
    make.add_argument("trace", type=Path, metavar="FILE")
    make.add_argument("--requests", type=_positive, default=5000, metavar="N")
    make.add_argument("--seed", type=int, default=0)
    return parser


def _need_libraries() -> None:
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} is missing: pip install kvbm[replay]")


def _replayed(
    arguments: argparse.Namespace,
    requests: trace.Trace,
    capacity: int,
    policy: PolicyMaker | None,
    progress: Callable[[int], None],
) -> Outcome:
    pace = Pace(arguments.prefill_tokens_s, arguments.decode_ms)
    if arguments.disk is None:
        return replay(requests, capacity, pace, progress, policy)
    return replay_with_disk(
        requests,
        capacity,
        arguments.disk,
        filtered=not arguments.no_disk_filter,
        pace=pace,
        progress=progress,
        policy=policy,
    )


def _run(arguments: argparse.Namespace) -> None:
    _need_libraries()
    from rich.console import Console
    from rich.progress import Progress

    from kvbm.replay import report

    policy = policy_of(arguments.policy, "--policy")
    requests = trace.read(arguments.trace)
    comparisons = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for capacity in arguments.capacity:
            task = progress.add_task(f"{capacity:,} blocks", total=requests.references)
            advance = partial(progress.advance, task)
            outcome = _replayed(arguments, requests, capacity, policy, advance)
            others = {} if arguments.alone else YARDSTICKS
            hits = {name: policy(requests, capacity) for name, policy in others.items()}
            comparisons.append(report.Comparison(outcome, hits))
    size = arguments.token_bytes
    block_bytes = None if size is None else size * requests.block_tokens
    if arguments.plot is not None:
        from kvbm.replay.plot import plot

        try:
            plot(requests.name, comparisons, block_bytes, arguments.plot)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--plot {arguments.plot}: {error}") from None
    if arguments.json:
        print(json.dumps(report.as_dict(requests, comparisons, arguments.policy), indent=2))
    else:
        report.show(
            Console(width=None if sys.stdout.isatty() else 120),
            requests,
            comparisons,
            block_bytes,
            arguments.policy,
        )


def _make(arguments: argparse.Namespace) -> None:
    made = synthetic.conversations(arguments.requests, arguments.seed)
    try:
        with arguments.trace.open("w", encoding="utf-8") as file:
            file.writelines(trace.lines(made))
    except OSError as error:
        raise ConfigError(f"cannot write {arguments.trace}: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 1 with a message."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        {"run": _run, "make": _make}[arguments.command](arguments)
    except KvbmError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0
