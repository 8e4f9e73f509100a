# SPDX-License-Identifier: Apache-2.0
"""Walks of those who only read: every command of the viewer, the live view and the exporter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from random import Random

from click.testing import CliRunner

import kvbm.inspect.verify
from kvbm.errors import InspectError
from kvbm.inspect import cli
from kvbm.inspect.frame import frame
from kvbm.inspect.live import LiveSegment, Rates
from kvbm.inspect.top_view import screen
from kvbm.metrics.collector import InstanceCollector
from tests.fuzz.world import World

OUTPUT_BYTES_MAX = 64 << 20


def command(world: World, random: Random, *words: str, live: bool = True) -> None:
    """Run one command; its exit status is one of those that it has."""
    kvbm.inspect.verify.PAUSE_SECS = 0.0
    source = world.instance
    if not live:
        source = str(world.folder / "copy")
        shutil.copyfile(world.path, source)
    options = ["--json"] if random.random() < 0.5 and words[0] not in ("map", "snapshot") else []
    still = not world.racing and not world.closing and random.random() < 0.2
    before = world.path.read_bytes() if still else b""
    done = CliRunner().invoke(cli.main, [*words, source, *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 1, 2), done.output
    assert len(done.output) < OUTPUT_BYTES_MAX
    assert not still or world.path.read_bytes() == before, "a reader has written"
    if done.exit_code == 2:
        raise InspectError(done.output)


def lists(world: World, random: Random) -> None:
    """The commands that print lists."""
    words = random.choice(
        [
            ("show",),
            ("blocks", "--sort", random.choice(["block", "age", "tick", "children"])),
            ("ops", "--rows"),
            ("participants",),
            ("tree",),
            ("tree", "--depth", "2", "--group", "0"),
            ("block", random.choice(["block:3", "slot:3", "8f", "digest:00", "block:63"])),
        ]
    )
    command(world, random, *words, live=random.random() < 0.7)


def verify(world: World, random: Random) -> None:
    """The check of the invariants, and the line of `list`."""
    row = cli._instance_row(world.instance)
    assert row["bytes"] >= 0
    command(world, random, "verify", live=random.random() < 0.7)


def files(world: World, random: Random) -> None:
    """The commands that write files, and the one that compares."""
    out = world.folder / "out.svg"
    snapshot = world.folder / "out.kvbm"
    what = random.choice(["tiers", "tree", "snapshot"])
    if what == "snapshot":
        command(world, random, "snapshot", str(snapshot))
        command(world, random, "diff", str(snapshot))
    else:
        colour = random.choice(["state", "age", "owner", "group"])
        command(world, random, "map", str(out), "--what", what, "--by", colour)
        assert out.stat().st_size < OUTPUT_BYTES_MAX


def follow(world: World, random: Random) -> None:
    """The live view, on the terminal and as a web page."""
    with LiveSegment(world.instance) as live:
        rates = Rates(0)
        for turn in range(2):
            rates.add(float(turn), live.counters())
            picture = frame(live, rates)
            assert len(screen(picture)) < 1000
            assert len(json.dumps(picture)) < OUTPUT_BYTES_MAX
        live.sweep(16)
        live.sweep_all()
        live.digest(0)


def export(world: World, random: Random) -> None:
    """What the exporter says, where this instance is the only one."""
    collector = InstanceCollector(lambda: [world.instance])
    try:
        assert sum(1 for _ in collector.collect()) > 0
    finally:
        collector.close()


WALKS: dict[str, Callable[[World, Random], None]] = {
    "lists": lists,
    "verify": verify,
    "files": files,
    "follow": follow,
    "export": export,
}
