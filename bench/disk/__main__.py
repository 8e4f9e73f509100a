# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.disk``: the disk tier beside plain I/O, in one run; prints Markdown.

Transfers: each round moves the same number of blocks plainly (threads that call ``preadv`` or
``pwritev`` with the same depth, on the same file and memory) and through the tier: operations,
headers, checksums, publishing. The rounds alternate; a ratio is the median of the rounds' ratios.
Reads are cold: O_DIRECT, every block another one than the round before. Processor time is that of
the whole process. fio has a file and memory of its own.

Writes of a named cache are synced; its plain counterpart syncs after as many blocks as an operation
has.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench.disk.plain import FIO_ENGINES, PlainDisk, fio
from bench.disk.reopen import reopen
from bench.disk.rig import BATCH_BLOCKS, DiskRig
from kvbm.errors import ConfigError
from kvbm.transfer.nixl import nixl_library

KIB = 1024
SHAPES = ((2048, 1), (2048, 32), (256, 1), (64, 1))
"""KiB of a block, and in how many pieces it lies in the host tier."""

WAYS = {
    "kvbm": (False, None),
    "kvbm, named": (True, None),
    "kvbm, NIXL libaio": (False, {"use_aio": "true"}),
    "kvbm, NIXL io_uring": (False, {"use_uring": "true"}),
}
"""Whether the cache is named, and parameters of NIXL's POSIX backend where that moves the bytes."""


class Meter:
    """Rounds of one way to move blocks: seconds, processor seconds, bytes written."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self.secs: list[float] = []
        self.cpu: list[float] = []
        self.written = 0

    def round(self) -> None:
        """Measure once."""
        written, cpu, began = bytes_written(), time.process_time(), time.perf_counter()
        self._action()
        self.secs.append(time.perf_counter() - began)
        self.cpu.append(time.process_time() - cpu)
        self.written += bytes_written() - written

    def row(self, plain: Meter, blocks: int, block_bytes: int) -> list[str]:
        """MB/s, ratio to plain, CPU microseconds a block, written bytes a byte."""
        total = blocks * block_bytes
        ratio = statistics.median(p / s for p, s in zip(plain.secs, self.secs, strict=True))
        return [
            f"{total / statistics.median(self.secs) / 1e6:,.0f}",
            f"{total / min(self.secs) / 1e6:,.0f}",
            f"{ratio:.2f}",
            f"{statistics.median(self.cpu) / blocks * 1e6:.0f}",
            f"{self.written / (total * len(self.secs)):.4f}" if self.written else "",
        ]


def bytes_written() -> int:
    """Bytes that this process has caused to be written to disks."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    return 0


def nixl_is_there() -> bool:
    """Whether NIXL is installed."""
    try:
        nixl_library()
    except ConfigError:
        return False
    return True


def print_row(cells: Sequence[str]) -> None:
    """One line of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def measured(
    rig: DiskRig, named: bool, options: argparse.Namespace, label: str, progress: Console
) -> dict[str, list[Meter]]:
    """Rounds of a rig, each after one of plain I/O."""
    plain = PlainDisk(rig.slab, rig.plain_slots, rig.memory, options.depth)
    groups: dict[str, tuple[Callable[[], object], ...]] = {
        "read": (plain.read, rig.fetch),
        "write": (plain.write, rig.spill),
    }
    if named:
        groups = {"write, synced": (functools.partial(plain.write, BATCH_BLOCKS), rig.spill)}
    found = {}
    for what, ways in groups.items():
        meters = found[what] = [Meter(way) for way in ways]
        title = f"{label} {what}"
        for _ in track(range(options.rounds), title, console=progress, transient=True):
            for meter in meters:
                meter.round()
    return found


def compare(options: argparse.Namespace, kib: int, pieces: int, progress: Console) -> None:
    """Rows of the transfers of one size."""
    block_bytes = kib * KIB
    blocks = max(options.mib * KIB // kib // BATCH_BLOCKS, 1) * BATCH_BLOCKS
    folder: Path = options.folder
    label = f"{kib} KiB" + (f" in {pieces} pieces" if pieces > 1 else "")
    for way, (named, nixl) in WAYS.items():
        if nixl is not None and not options.nixl:
            continue
        with closing(
            DiskRig(
                folder, blocks, block_bytes, pieces, threads=options.depth, named=named, nixl=nixl
            )
        ) as rig:
            for what, meters in measured(rig, named, options, label, progress).items():
                for name, meter in zip(("plain", way), meters, strict=True):
                    print_row([label, what, name, *meter.row(meters[0], blocks, block_bytes)])
    if pieces == 1 and options.fio:
        for kind in ("read", "write"):
            for engine in FIO_ENGINES:
                rate = fio(folder, options.mib, block_bytes, options.depth, kind, engine)
                if rate:
                    print_row([label, kind, f"fio {engine}", f"{rate:,.0f}", "", "", "", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.disk", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=int, default=256, help="size of a round")
    parser.add_argument("--depth", type=int, default=8, help="reads or writes under way")
    parser.add_argument("--kib", type=int, nargs="*", help="only these sizes of a block")
    parser.add_argument("--fio", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--nixl", action=argparse.BooleanOptionalAction, default=nixl_is_there())
    parser.add_argument("--terabytes", type=float, default=1.0, help="of the slab to reopen")
    options = parser.parse_args(arguments)
    progress = Console(stderr=True)
    print(f"{platform.system()} {platform.release()}, {os.cpu_count()} cores\n")
    print_row(["block", "what", "by", "MB/s", "best", "ratio", "CPU us a block", "written"])
    print_row(["---"] * 8)
    for kib, pieces in SHAPES:
        if not options.kib or kib in options.kib:
            compare(options, kib, pieces, progress)
    found = reopen(options.folder, int(options.terabytes * 1e12), 2 << 20)
    print(
        f"\nReopened: {found.slots:,} slots of 2 MiB, {found.restored:,} blocks found: slab "
        f"{found.slab_secs:.3f} s, tree {found.tree_secs:.3f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
