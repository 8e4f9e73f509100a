# SPDX-License-Identifier: Apache-2.0
"""How a scenario is put together: a segment, actors on its lines, and what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tests.model.blocks import Process
from tests.model.cells import (
    LEADER,
    WORKER,
    Seed,
    Segment,
    Sizes,
)
from tests.model.explore import Actions, Actor, Model
from tests.model.invariants import check_always, check_end, check_step
from tests.model.recovery import recover_after_crash, recover_after_each_crash
from tests.model.rules import Rules

# The digests of all scenarios and what comes before each in its chain.
CHAINS = {"A": None, "B": "A", "C": "B", "X": None, "Y": "X", "A'": None, "B'": "A'"}
Body = Callable[[Process], Actions]


class Part(NamedTuple):
    """An actor of a scenario: what it does, on which line, and what may happen to it."""

    name: str
    body: Body
    leader: int
    rank: int | None = None
    crashes: bool = True
    last: bool = False
    idles: bool = False
    attached: bool = True  # has its line from the start


class Scenario(NamedTuple):
    """A segment, the actors on it, and how many of them may die."""

    name: str
    about: str
    sizes: Sizes
    seeds: tuple[Seed, ...]
    parts: tuple[Part, ...]
    crashes: int = 1
    disk: Sizes | None = None  # of the disk tier's segment
    on_disk: tuple[Seed, ...] = ()


def build(scenario: Scenario, rules: Rules, strict: bool = True) -> Model:
    """Make the model of a scenario under some rules.

    Without `strict` only outcomes are checked, not the table of transitions.
    """
    segment = Segment(scenario.sizes)
    segment.seed(*scenario.seeds)
    disk = None
    if scenario.disk is not None:
        disk = Segment(scenario.disk, segment.names, segment.initial)
        disk.crashed = segment.crashed
        disk.seed(*scenario.on_disk)
    segments = [one for one in (segment, disk) if one is not None]
    acting: list[Actor] = []
    for number, part in enumerate(scenario.parts, start=1):
        line = part.leader
        if part.rank is not None:
            line = segment.worker_line(part.leader, part.rank)
        p = Process(segment, rules, number, line, part.leader, part.rank or 0)
        if disk is not None:
            p.disk = Process(disk, rules, number, line, part.leader, part.rank or 0)
        if part.attached:
            for one in segments if part.rank is None else [segment]:
                segment.initial[one.lock[line]] = number
                segment.initial[one.role[line]] = LEADER if part.rank is None else WORKER
        acting.append(Actor(part.name, _bind(part.body, p), part.crashes, part.last, part.idles))

    def always(memory: Sequence[Any]) -> Iterable[str]:
        for one in segments:
            yield from check_always(one, CHAINS, memory)

    def write(old: Any, new: Any) -> Iterable[str]:
        return check_step(old, new) if strict else ()

    def end(memory: Sequence[Any]) -> Iterable[str]:
        for one in segments:
            yield from check_end(one, CHAINS, memory)

    return Model(
        segment.names,
        segment.initial,
        acting,
        [lock for one in segments for lock in (*one.lock, one.recovery_lock)],
        segment.crashed,
        always,
        write,
        end,
        scenario.crashes,
    )


def _bind(body: Body, p: Process) -> Callable[[], Actions]:
    return lambda: body(p)


def survivor(leader: int) -> Part:
    """A process that recovers when nothing else is left to happen."""
    return Part("survivor", recover_after_each_crash, leader, None, False, last=True, idles=True)


def recoverer(leader: int) -> Part:
    """A process that recovers as soon as somebody has died, while the others go on."""
    return Part("recoverer", recover_after_crash, leader, idles=True)


def part(name: str, actor: Callable[..., Actions], *arguments: Any, **where: Any) -> Part:
    """An actor with its arguments, its place and what may happen to it."""
    return Part(name, lambda p: actor(p, *arguments), **where)
