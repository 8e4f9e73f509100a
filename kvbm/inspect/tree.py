# SPDX-License-Identifier: Apache-2.0
"""The radix tree of an instance, with chains of only children drawn together as runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.inspect.decode import Segment
from kvbm.inspect.report import Row, leaders_in

Numbers = npt.NDArray[np.int64]


@dataclass
class Run:
    """A chain of blocks each of which, but the last, has exactly one child.

    Attributes
    ----------
    blocks : array of int
        Their numbers, the one nearest to the root first.
    children : list of Run
        Runs that begin below the last block, the largest first.
    total : int
        Blocks of this run and of all below.
    orphan : bool
        It names a parent that is not there.
    """

    blocks: Numbers
    children: list[Run] = field(default_factory=list)
    total: int = 0
    orphan: bool = False


@dataclass(frozen=True)
class Tree:
    """All runs.

    Attributes
    ----------
    roots : list of Run
        The largest first.
    unreachable : int
        Blocks that no root leads to: their parents form a ring, which only damage can make.
    """

    roots: list[Run]
    unreachable: int


def tree_of(segment: Segment, group: int | None = None) -> Tree:
    """Build the tree of the blocks that are registered or being filled."""
    blocks = segment.blocks
    count = len(blocks)
    live = blocks.of_state("registered") | blocks.of_state("partial")
    if group is not None:
        live &= blocks.group == group
    parent = np.where(blocks.parent_found, blocks.parent, -1)
    linked = live & (parent >= 0)
    linked[linked] = live[parent[linked]]
    parent = np.where(linked, parent, -1)
    children = np.bincount(parent[linked], minlength=count)
    begins = live & ~linked
    begins[linked] = children[parent[linked]] != 1
    head = np.where(live & ~begins, parent, np.arange(count))
    depth = np.where(live & ~begins, 1, 0)
    for _ in range(max(1, count).bit_length()):  # each turn doubles how far a block has looked up
        depth += depth[head]
        head = head[head]
    reached = live & begins[head]
    runs = _runs(head, depth, np.flatnonzero(reached))
    roots = _link(runs, parent, head)
    for root in roots:
        first = int(root.blocks[0])
        root.orphan = bool(blocks.parent[first] >= 0 or blocks.position[first] > 0)
    seen = sum(root.total for root in roots)
    return Tree(sorted(roots, key=lambda run: -run.total), int(live.sum()) - seen)


def _runs(head: Numbers, depth: Numbers, members: Numbers) -> dict[int, Run]:
    """Runs by their first block."""
    if len(members) == 0:
        return {}
    order = members[np.lexsort((depth[members], head[members]))]
    starts = np.flatnonzero(np.diff(head[order], prepend=-1))
    return {int(piece[0]): Run(piece) for piece in np.split(order, starts[1:])}


def _link(runs: dict[int, Run], parent: Numbers, head: Numbers) -> list[Run]:
    """Put each run below the one that its first block's parent is in; returns the roots."""
    roots = []
    for first, run in runs.items():
        above = int(parent[first])
        if above < 0:
            roots.append(run)
        elif int(head[above]) in runs:
            runs[int(head[above])].children.append(run)
    for root in roots:
        order = list(_walk(root))
        for run in reversed(order):
            run.total = len(run.blocks) + sum(child.total for child in run.children)
        for run in order:
            run.children.sort(key=lambda child: -child.total)
    return roots


def _walk(root: Run) -> Iterator[Run]:
    """A run and all below it, parents first."""
    waiting = [root]
    while waiting:
        run = waiting.pop()
        yield run
        waiting.extend(reversed(run.children))


@dataclass(frozen=True)
class Node:
    """A run and where it stands: `last` says of each level whether no sibling follows."""

    run: Run
    last: tuple[bool, ...]


def nodes(tree: Tree, depth: int | None = None, least: int = 1) -> Iterator[Node]:
    """All runs in the order in which a tree is read.

    Parameters
    ----------
    depth : int, optional
        Levels of runs to show.
    least : int
        Smallest subtree to show, in blocks.
    """
    waiting = [Node(root, ()) for root in reversed(tree.roots) if root.total >= least]
    while waiting:
        node = waiting.pop()
        yield node
        if depth is not None and len(node.last) + 1 >= depth:
            continue
        below = [child for child in node.run.children if child.total >= least]
        for number in range(len(below) - 1, -1, -1):
            last = number == len(below) - 1
            waiting.append(Node(below[number], (*node.last, last)))


def node_row(segment: Segment, node: Node) -> Row:
    """One run as data."""
    blocks, run = segment.blocks, node.run
    first, last = int(run.blocks[0]), int(run.blocks[-1])
    holders = int(np.bitwise_or.reduce(blocks.holders[run.blocks]))
    newest = int(blocks.registered_ns[run.blocks].max())
    parent = int(blocks.parent[first])
    slots = blocks.slot[run.blocks, 0][blocks.placement_state[run.blocks, 0] != 0]
    return {
        "level": len(node.last),
        "first": first,
        "last": last,
        "length": len(run.blocks),
        "total": run.total,
        "branches": len(run.children),
        "parent": None if parent < 0 else parent,
        "orphan": run.orphan,
        "position": int(blocks.position[first]),
        "group": int(blocks.group[first]),
        "held_by": leaders_in(holders),
        "partial": int((blocks.state[run.blocks] == 1).sum()),
        "age_seconds": segment.age_seconds(newest),
        "tick": int(blocks.tick[run.blocks].max()),
        "digest": blocks.digests[first].tobytes().hex(),
        "last_digest": blocks.digests[last].tobytes().hex(),
        "slots": [int(slot) for slot in slots],
    }


def branch(node: Node) -> str:
    """The lines that lead to a run in a drawing of the tree."""
    if not node.last:
        return ""
    lead = "".join("   " if last else "│  " for last in node.last[:-1])
    return lead + ("└─ " if node.last[-1] else "├─ ")


def summary(tree: Tree) -> dict[str, Any]:
    """Numbers about the whole."""
    return {
        "roots": len(tree.roots),
        "orphans": sum(root.orphan for root in tree.roots),
        "blocks": sum(root.total for root in tree.roots),
        "unreachable": tree.unreachable,
    }
