# SPDX-License-Identifier: Apache-2.0
"""Every interleaving of a few actors over shared cells, with crashes.

An actor is a generator that yields a `Step` before each access to shared memory and is sent the
result. It is deterministic: what it does next depends only on the results that it was sent, so its
local state is a place in the code with the values of the local variables. Generators cannot be
copied; each local state is therefore reached once, by replaying a generator from its start, and
kept as a node with a table "value of the cell -> new value, next node". From then on exploring is
looking up tables: a state of the whole is one string with a character for each cell and for each
actor, and breadth-first search over a set of strings visits each state once.

Two rules for actors follow: at a yield no value may wait on the evaluation stack (assign the result
of each yield to a variable), and loops run over ranges, whose position the loop variable tells.

Two reductions, both exact. A crash before a step that only reads leads to the same state as a crash
after it, so actors crash only before a step that may write, while they wait, or after their last
step. And a memory is checked against the invariants once, however many states share it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

READ, WRITE, WAIT, FAIL = "read", "write", "wait", "fail"


class Step(NamedTuple):
    """One access to one cell; `apply` and its arguments say what it does."""

    label: str
    kind: str
    cell: int
    apply: Callable[..., tuple[Hashable, Hashable] | None]
    arguments: tuple[Hashable, ...]
    deadline: bool = False


Actions = Generator[Step, Any, Any]
Entry = tuple[str, str]  # characters: new value of the cell, next node of the actor


class Actor(NamedTuple):
    """A process: `program` makes its generator."""

    name: str
    program: Callable[[], Actions]
    crashes: bool = False
    last: bool = False  # runs when nobody else can
    idles: bool = False  # may wait forever


class Violation(Exception):
    """A property does not hold; `trace` is a shortest way there, one line a step."""

    def __init__(self, message: str, trace: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *trace]))
        self.message = message
        self.trace = list(trace)


@dataclass
class Statistics:
    """What one exploration visited."""

    states: int = 0
    transitions: int = 0
    memories: int = 0
    ends: int = 0
    depth: int = 0
    seconds: float = 0.0


@dataclass
class Model:
    """What is explored.

    Attributes
    ----------
    names, initial : list
        Name and first value of each cell.
    locks : list of int
        Cells that are locks which the kernel drops: their value is 0 or the number of the actor
        that holds them (its position + 1).
    crash_cell : int
        Counts the crashes; recoveries wait for it.
    check : callable
        Given the values of all cells, yields what is violated; for every memory.
    check_step : callable
        Given old and new value of a cell, yields what is violated; for every write.
    check_end : callable
        As `check`, for the memories in which everything has come to its end.
    """

    names: list[str]
    initial: list[Hashable]
    actors: list[Actor]
    locks: list[int]
    crash_cell: int
    check: Callable[[Sequence[Any]], Iterable[str]]
    check_step: Callable[[Any, Any], Iterable[str]]
    check_end: Callable[[Sequence[Any]], Iterable[str]]
    crashes: int = 0
    states_max: int = 3_000_000


def frames_of(actions: Actions) -> Iterator[FrameType]:
    """The frames of a suspended generator and of those that it delegates to."""
    inner: Any = actions
    while inner is not None and getattr(inner, "gi_frame", None) is not None:
        yield inner.gi_frame
        inner = inner.gi_yieldfrom


def local_state(actions: Actions) -> Hashable:
    """Where a suspended generator is, and its local variables."""
    return tuple(
        (id(frame.f_code), frame.f_lasti, tuple(frame.f_locals.items()))
        for frame in frames_of(actions)
    )


@dataclass
class Node:
    """A local state of an actor: its next step, and a table of that step by the cell's value."""

    step: Step | None
    path: tuple[Hashable, ...]
    table: dict[str, Entry | None] = field(default_factory=dict)


class Program:
    """The local states of one actor, found as the exploration needs them."""

    def __init__(self, actor: Actor, merge: bool) -> None:
        self.actor = actor
        self.merge = merge
        self.nodes: dict[str, Node] = {}
        self.steps: dict[str, tuple[int, dict[str, Entry | None]]] = {}
        self.known: dict[Hashable, str] = {}
        self.dead = self._keep(("dead",), Node(None, ()))
        self.start = self.reach(())

    def _keep(self, key: Hashable, node: Node) -> str:
        name = chr(len(self.nodes) + 1)
        self.known[key] = name
        self.nodes[name] = node
        if node.step is not None:
            self.steps[name] = (node.step.cell, node.table)
        return name

    def reach(self, path: tuple[Hashable, ...]) -> str:
        """The node that is reached by being sent these results."""
        actions = self.actor.program()
        step: Step | None
        key: Hashable
        try:
            step = next(actions)
            for result in path:
                step = actions.send(result)
            key = local_state(actions) if self.merge else path
        except StopIteration:
            step, key = None, ("finished",)
        known = self.known.get(key)
        return self._keep(key, Node(step, path)) if known is None else known


class Explorer:
    """Breadth-first search over all states of a model."""

    def __init__(self, model: Model, merge: bool = True) -> None:
        self.model = model
        self.values: dict[Hashable, str] = {}
        self.decoded: list[Hashable] = [None]
        self.cell_count = len(model.initial)
        programs = [Program(actor, merge) for actor in model.actors]
        self.acting = list(enumerate(programs, start=self.cell_count))
        self.moving = [(at, program) for at, program in self.acting if not program.actor.last]
        self.may_crash: set[str] = set()
        self.checked: set[str] = set()
        self.parents: dict[str, str] = {}
        self.statistics = Statistics()

    # ---- encoding --------------------------------------------------------------------------------
    def encode(self, value: Hashable) -> str:
        """The character that stands for a value."""
        # Python holds 1, 1.0 and True for equal: the type is part of the key.
        key = (type(value), value)
        character = self.values.get(key)
        if character is None:
            character = self.values[key] = chr(len(self.decoded))
            self.decoded.append(value)
        return character

    def memory(self, state: str) -> list[Hashable]:
        """The values of all cells."""
        return [self.decoded[ord(c)] for c in state[: self.cell_count]]

    def initial_state(self) -> str:
        cells = "".join(self.encode(value) for value in self.model.initial)
        return cells + "".join(program.start for _, program in self.acting)

    # ---- steps -----------------------------------------------------------------------------------
    def fill(self, program: Program, name: str, character: str) -> Entry | None:
        """Compute one entry of a node's table: new value of the cell and next node."""
        node = program.nodes[name]
        step = node.step
        assert step is not None
        old = self.decoded[ord(character)]
        outcome = step.apply(old, *step.arguments)
        entry = None
        if outcome is not None:
            new, result = outcome
            for problem in self.model.check_step(old, new):
                raise Violation(problem)
            entry = (self.encode(new), program.reach((*node.path, result)))
        node.table[character] = entry
        return entry

    def step_of(self, state: str, position: int, program: Program) -> str | None:
        """The state after one actor's next step; None if it has none or must wait."""
        name = state[position]
        waiting = program.steps.get(name)
        if waiting is None:
            return None
        cell, table = waiting
        old = state[cell]
        entry = table[old] if old in table else self.fill(program, name, old)
        if entry is None:
            return None
        new, after = entry
        if new == old:
            return state[:position] + after + state[position + 1 :]
        return f"{state[:cell]}{new}{state[cell + 1 : position]}{after}{state[position + 1 :]}"

    def successors(self, state: str) -> list[str]:
        """The states after one step, crashes included; checks the end where there is no step."""
        found = []
        for position, program in self.moving:
            successor = self.step_of(state, position, program)
            if successor is not None:
                found.append(successor)
        if not found:
            found = self.when_nothing_moves(state)
            if not found:  # also where somebody who waits, or is through, may still die
                self.check_end(state)
        if state[self.model.crash_cell] in self.may_crash:
            found += [successor for _, successor in self.crashes_of(state)]
        return found

    def when_nothing_moves(self, state: str) -> list[str]:
        """Deadlines pass, and the actors that come last run."""
        found = []
        for position, program in self.acting:
            node = program.nodes[state[position]]
            if program.actor.last:
                successor = self.step_of(state, position, program)
                if successor is not None:
                    found.append(successor)
            elif node.step is not None and node.step.deadline:
                after = program.reach((*node.path, None))
                found.append(state[:position] + after + state[position + 1 :])
        return found

    def crashes_of(self, state: str) -> Iterator[tuple[Program, str]]:
        """The states in which one actor has just died."""
        crashed = self.decoded[ord(state[self.model.crash_cell])]
        assert isinstance(crashed, int)
        for number, (position, program) in enumerate(self.acting, start=1):
            name = state[position]
            step = program.nodes[name].step
            if not program.actor.crashes or name == program.dead:
                continue
            if step is not None and step.kind == READ:
                continue
            cells = list(state)
            cells[position] = program.dead
            cells[self.model.crash_cell] = self.encode(crashed + 1)
            for lock in self.model.locks:
                if self.decoded[ord(cells[lock])] == number:
                    cells[lock] = self.encode(0)
            yield program, "".join(cells)

    # ---- search ----------------------------------------------------------------------------------
    def check(self, state: str) -> None:
        """Check the invariants, once a memory."""
        memory = state[: self.cell_count]
        if memory not in self.checked:
            self.checked.add(memory)
            for problem in self.model.check(self.memory(state)):
                raise Violation(problem)

    def check_end(self, state: str) -> None:
        """Check a state in which nothing is left to happen."""
        self.statistics.ends += 1
        for position, program in self.acting:
            step = program.nodes[state[position]].step
            if step is not None and not program.actor.idles:
                raise Violation(f"{program.actor.name} waits forever for {step.label}")
        for problem in self.model.check_end(self.memory(state)):
            raise Violation(f"at the end: {problem}")

    def search(self, traced: bool = False) -> Statistics:
        """Visit every state.

        Raises
        ------
        Violation
            A property does not hold.
        """
        began = time.perf_counter()
        statistics = self.statistics
        start = self.initial_state()
        self.may_crash = {self.encode(count) for count in range(self.model.crashes)}
        self.check(start)
        seen = {start}
        frontier = [start]
        while frontier:
            reached: list[str] = []
            for state in frontier:
                last = None
                try:
                    found = self.successors(state)
                    statistics.transitions += len(found)
                    for last in found:
                        if last not in seen:
                            seen.add(last)
                            reached.append(last)
                            if traced:
                                self.parents[last] = state
                            self.check(last)
                except Violation as violation:
                    raise Violation(violation.message, self.trace(state, last)) from None
            statistics.depth += 1
            frontier = reached
            if len(seen) > self.model.states_max:
                raise RuntimeError(f"more than {self.model.states_max} states")
        statistics.states = len(seen)
        statistics.memories = len(self.checked)
        statistics.seconds = time.perf_counter() - began
        return statistics

    # ---- traces ----------------------------------------------------------------------------------
    def describe(self, state: str, after: str) -> str:
        """What leads from one state to the next."""
        for program, successor in self.crashes_of(state):
            if successor == after:
                return f"{program.actor.name} dies"
        for position, program in self.acting:
            if state[position] != after[position]:
                step = program.nodes[state[position]].step
                assert step is not None
                old, new = (self.decoded[ord(s[step.cell])] for s in (state, after))
                change = f"{old}" if old == new else f"{old} -> {new}"
                return f"{program.actor.name}: {step.label} {self.model.names[step.cell]}: {change}"
        return "nothing"

    def trace(self, state: str, last: str | None) -> list[str]:
        """The steps that led to a state and on to the last one, as far as they were kept."""
        states = [state] if last is None else [last, state]
        while states[-1] in self.parents:
            states.append(self.parents[states[-1]])
        states.reverse()
        pairs = itertools.pairwise(states)
        return [f"{i:3} {self.describe(a, b)}" for i, (a, b) in enumerate(pairs, start=1)]


def explore(make: Callable[[], Model], merge: bool = True) -> Statistics:
    """Visit every state of a model; a violation is raised with a shortest trace."""
    try:
        return Explorer(make(), merge).search()
    except Violation:
        return Explorer(make(), merge).search(traced=True)


# ---- accesses, for actors to yield ---------------------------------------------------------------
def _load(old: Hashable) -> tuple[Hashable, Hashable]:
    return old, old


def _store(old: Hashable, new: Hashable) -> tuple[Hashable, Hashable]:
    return new, None


def _cas(old: Hashable, expected: Hashable, new: Hashable) -> tuple[Hashable, Hashable]:
    return (new, (True, old)) if old == expected else (old, (False, old))


def _or(old: int, bits: int) -> tuple[int, int]:
    return old | bits, old


def _and(old: int, bits: int) -> tuple[int, int]:
    return old & bits, old


def _wait(old: Hashable, ready: Callable[..., bool], *extra: Hashable) -> Any:
    return (old, old) if ready(old, *extra) else None


def _fail(old: Hashable, message: str) -> tuple[Hashable, Hashable]:
    raise Violation(message)


def load(cell: int, label: str = "load") -> Step:
    """Read a cell."""
    return Step(label, READ, cell, _load, ())


def store(cell: int, value: Hashable, label: str = "store") -> Step:
    """Write a cell."""
    return Step(label, WRITE, cell, _store, (value,))


def cas(cell: int, expected: Hashable, new: Hashable, label: str = "cas") -> Step:
    """Compare and swap; the result is (done, value before)."""
    return Step(label, WRITE, cell, _cas, (expected, new))


def fetch_or(cell: int, bits: int, label: str = "or") -> Step:
    """Set bits; the result is the value before."""
    return Step(label, WRITE, cell, _or, (bits,))


def fetch_and(cell: int, bits: int, label: str = "and") -> Step:
    """Keep only these bits; the result is the value before."""
    return Step(label, WRITE, cell, _and, (bits,))


def wait(
    cell: int, label: str, ready: Callable[..., bool], *extra: Hashable, deadline: bool = False
) -> Step:
    """Wait until a cell's value is ready; with a deadline the result may be None."""
    return Step(label, WAIT, cell, _wait, (ready, *extra), deadline)


def fail(message: str) -> Step:
    """Report a violation that an actor has seen."""
    return Step("fail", FAIL, 0, _fail, (message,))
