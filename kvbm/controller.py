# SPDX-License-Identifier: Apache-2.0
"""Count and empty the pools of a live cache, from outside the engine.

::

    python -m kvbm.controller --instance chat status G2
    python -m kvbm.controller --instance chat reset-blocks G2 8026409477313730465 0x71c98f...
    python -m kvbm.controller --instance chat reset G2 [--force]
    python -m kvbm.controller --instance chat reset-all
    python -m kvbm.controller list

Upstream's controller is an endpoint that answers messages; here nobody has to answer: `status`
attaches read-only, the others as one more leader for the moment, and work on the segment in place.
What the engine does meanwhile stays right: a block that it holds is never taken, and one that it
looks for in vain is a miss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvbm._fast.control import census
from kvbm._fast.participants import claim_leader
from kvbm._fast.recovery import recover
from kvbm._fast.segment import MAX_LEADERS, Segment, SegmentFault
from kvbm._fast.table import BlockTable
from kvbm.block_manager.pool import BlockPoolStatus, ResetBlocksResponse, reset_registered
from kvbm.config import load_settings
from kvbm.errors import (
    KvbmError,
    ResetError,
    SegmentAccessDenied,
    SegmentNotFound,
    TooManyLeaders,
    UnsupportedCacheLevel,
)
from kvbm.instance import instances, segment_name
from kvbm.shared import fault_error

__all__ = ["BlockManagerClient", "BlockPoolStatus", "ResetBlocksResponse", "main"]

LEVELS = {"G1": "device", "G2": "host", "G3": "disk"}


def _tier(level: str) -> str:
    """Tier of a level, in any case."""
    tier = LEVELS.get(level.upper())
    if tier is None:
        raise UnsupportedCacheLevel(level, "allowed are G1 (device), G2 (host) and G3 (disk)")
    if tier == "device":
        raise UnsupportedCacheLevel(
            level,
            "the device pool belongs to the engine: ask and reset it there (vLLM: /metrics "
            "and POST /reset_prefix_cache)",
        )
    return tier


class BlockManagerClient:
    """Works on one instance; each call attaches and detaches.

    Parameters
    ----------
    instance : str
        As `DYN_KVBM_INSTANCE` names it, or a private one as `instances` lists it.
    group : int, optional
        Group id whose members are trusted beside this process's user (`DYN_KVBM_SHM_GROUP`).
    """

    def __init__(self, instance: str, group: int | None = None) -> None:
        self.instance = instance
        self.group = group

    @contextmanager
    def _attached(self, writable: bool) -> Iterator[Segment]:
        name = segment_name(self.instance)
        try:
            segment = Segment.attach(name, writable, self.group)
        except FileNotFoundError:
            there = ", ".join(sorted(instances())) or "none"
            raise SegmentNotFound(name, f"instances on this host: {there}") from None
        except PermissionError as error:
            raise SegmentAccessDenied(name, error.strerror or "") from None
        except SegmentFault as fault:
            raise fault_error(name, fault) from None
        try:
            yield segment
        finally:
            segment.close()

    @contextmanager
    def _leading(self) -> Iterator[BlockTable]:
        with self._attached(True) as segment:
            recover(segment)
            try:
                claim_leader(segment, int.from_bytes(os.urandom(8), "little"))
            except SegmentFault:
                raise TooManyLeaders(segment.name, MAX_LEADERS) from None
            yield BlockTable(segment)

    def status(self, level: str) -> BlockPoolStatus:
        """Count the blocks of a pool by their use.

        Raises
        ------
        UnsupportedCacheLevel
            `level` is not G2 or G3 (in any case), or the instance has no such tier.
        SegmentError
            The instance is not there or cannot be read.
        """
        tier = _tier(level)
        with self._attached(False) as segment:
            counted = census(segment, tier)
        self._check_there(level, counted.total)
        return BlockPoolStatus.of(counted)

    def _check_there(self, level: str, slots: int) -> None:
        if slots == 0:
            raise UnsupportedCacheLevel(level, f"instance {self.instance} has no such tier")

    def _check_host(self, level: str) -> None:
        if _tier(level) != "host":
            raise UnsupportedCacheLevel(
                level, "it is emptied together with the host tier, which its blocks belong to: G2"
            )

    def reset_pool(self, level: str, *, force: bool = False) -> int:
        """Empty a pool; returns the number of blocks given back.

        Parameters
        ----------
        level : str
            "G2", in any case.
        force : bool
            Also while blocks are in use: these are kept until their users let go of them, but
            nobody can find them from now on. The same as the engine's own reset.

        Raises
        ------
        ResetError
            Blocks are in use; nothing was reset.
        UnsupportedCacheLevel, SegmentError
            As for `status`.
        """
        self._check_host(level)
        with self._leading() as table:
            counted = census(table.segment, "host")
            if not force and (counted.active or counted.filling):
                raise ResetError(counted.total, counted.empty + counted.inactive)
            return table.reset()

    def reset_blocks(self, level: str, sequence_hashes: Sequence[int]) -> ResetBlocksResponse:
        """Empty the blocks with these 64-bit sequence hashes, and their descendants, unless used.

        Raises
        ------
        UnsupportedCacheLevel, SegmentError
            As for `status`.
        """
        self._check_host(level)
        with self._leading() as table:
            return reset_registered(table, sequence_hashes)

    def reset_all_pools(self, *, force: bool = False) -> int:
        """Empty every pool that the instance has; as `reset_pool`."""
        return self.reset_pool("G2", force=force)


# ---- command line ------------------------------------------------------------------------------
def _sequence_hash(text: str) -> int:
    value = int(text, 0)
    if not 0 <= value < 1 << 64:
        raise ValueError(text)
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvbm.controller", description="Count and empty the pools of a live cache."
    )
    parser.add_argument(
        "--instance",
        default=os.environ.get("DYN_KVBM_INSTANCE"),
        help="name of the cache (default: DYN_KVBM_INSTANCE)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the instances on this host")
    status = commands.add_parser("status", help="numbers of active, inactive and empty blocks")
    reset = commands.add_parser("reset", help="empty a pool")
    blocks = commands.add_parser("reset-blocks", help="empty the blocks with these sequence hashes")
    every = commands.add_parser("reset-all", help="empty all pools")
    for command in (status, reset, blocks):
        command.add_argument("level", help="G2 (host) or G3 (disk)")
    blocks.add_argument(
        "sequence_hashes",
        nargs="+",
        type=_sequence_hash,
        metavar="HASH",
        help="64-bit sequence hash, decimal or 0x...",
    )
    for command in (reset, every):
        command.add_argument(
            "--force",
            action="store_true",
            help="also while blocks are in use: nobody finds them any more",
        )
    return parser


def _answer(arguments: argparse.Namespace) -> dict[str, object]:
    if arguments.command == "list":
        return {"instances": sorted(instances())}
    client = BlockManagerClient(arguments.instance, load_settings().shm_group)
    commands: dict[str, Callable[[], dict[str, object]]] = {
        "status": lambda: _as_dict(client.status(arguments.level)),
        "reset": lambda: {"given_back": client.reset_pool(arguments.level, force=arguments.force)},
        "reset-all": lambda: {"given_back": client.reset_all_pools(force=arguments.force)},
        "reset-blocks": lambda: _as_dict(
            client.reset_blocks(arguments.level, arguments.sequence_hashes)
        ),
    }
    return commands[arguments.command]()


def _as_dict(answer: BlockPoolStatus | ResetBlocksResponse) -> dict[str, object]:
    if isinstance(answer, BlockPoolStatus):
        return {
            "active_blocks": answer.active_blocks(),
            "inactive_blocks": answer.inactive_blocks(),
            "empty_blocks": answer.empty_blocks(),
        }
    return {
        "reset_blocks": answer.reset_blocks(),
        "not_found_blocks": answer.not_found_blocks(),
        "not_reset_blocks": answer.not_reset_blocks(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; prints one line of JSON. Returns the exit status: 0, or 1 with a message."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command != "list" and not arguments.instance:
        parser.error("which cache? --instance NAME or DYN_KVBM_INSTANCE; `list` shows them")
    try:
        print(json.dumps(_answer(arguments)))
    except KvbmError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
