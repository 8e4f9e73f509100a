# SPDX-License-Identifier: Apache-2.0
"""Random operations of two leaders against a dictionary, and the invariants after each of them.

The dictionary knows what must be in the tree, reserved and held. The state of the segment is read
from its bytes by a reader of its own (tests/fast/raw_segment.py), which also checks the invariants
I1, I2 and I4 of layout.h; I3 and I5 are checked here.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm._fast.keys import Keys
from kvbm._fast.operation_table import OperationTable
from tests.fast.instances import Instance, block_of, generation_of, instance
from tests.fast.raw_segment import HOST, PARTIAL, REGISTERED, Block

SLOTS = 12
PATHS = st.text("ab", min_size=1, max_size=7)
LEADERS = st.integers(0, 1)
Node = tuple[int, str]  # key epoch and path from the root


def keys_of(path: str) -> Keys:
    """Keys of a path: each block's hash covers everything before it."""
    return Keys(
        [hashlib.blake2b(path[: i + 1].encode(), digest_size=32).digest() for i in range(len(path))]
    )


@dataclass
class Leader:
    """What the dictionary says about one leader."""

    table: OperationTable
    pins: Counter[int] = field(default_factory=Counter)
    reserved: list[int] = field(default_factory=list)
    failed: bool = False  # its last reservation found nothing to evict


class TwoLeaders(RuleBasedStateMachine):
    """The dictionary beside the segment."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Instance = instance(SLOTS)
        self.epoch = 0
        self.node: dict[int, Node] = {}  # by reference, for ever
        self.parent: dict[int, int | None] = {}  # by reference
        self.tree: dict[Node, int] = {}  # registered
        self.identity: dict[tuple[int, int], bytes] = {}  # I5

    @initialize()
    def attach(self) -> None:
        self.leaders = [Leader(self.made.leader(key)) for key in range(2)]

    # ---- what the dictionary says ---------------------------------------------------------------
    def reserved_nodes(self) -> dict[Node, int]:
        return {self.node[ref]: ref for leader in self.leaders for ref in leader.reserved}

    def is_held(self, ref: int) -> bool:
        return any(leader.pins[ref] or ref in leader.reserved for leader in self.leaders)

    def evictable(self) -> list[int]:
        parents = {self.parent[ref] for ref in self.tree.values()}
        return [r for r in self.tree.values() if r not in parents and not self.is_held(r)]

    def forget_evicted(self) -> None:
        """Take over what the segment evicted; each had nothing that kept it."""
        blocks = self.made.raw.blocks()
        for node, ref in list(self.tree.items()):
            block = blocks[block_of(ref)]
            if block.state != REGISTERED or block.generation != generation_of(ref):
                assert not self.is_held(ref), f"{node} was evicted while it was held"
                del self.tree[node]

    # ---- rules ----------------------------------------------------------------------------------
    @rule(who=LEADERS, path=PATHS, start=st.integers(0, 3), stop=st.integers(0, 9))
    def match(self, who: int, path: str, start: int, stop: int) -> None:
        expected, deepest = 0, None
        for i in range(start, min(stop, len(path))):
            ref = self.tree.get((self.epoch, path[: i + 1]))
            if ref is None:
                break
            expected, deepest = expected + 1, ref
        assert self.leaders[who].table.match(keys_of(path), start, stop) == (expected, deepest)
        if deepest is not None:
            self.leaders[who].pins[deepest] += 1

    @rule(who=LEADERS, data=st.data())
    def unpin(self, who: int, data: st.DataObject) -> None:
        leader = self.leaders[who]
        held = sorted(leader.pins)
        if not held:
            return
        ref = data.draw(st.sampled_from(held))
        leader.table.unpin(ref)
        leader.pins -= Counter([ref])

    @rule(who=LEADERS, path=PATHS, priority=st.integers(0, 2))
    def reserve(self, who: int, path: str, priority: int) -> None:
        leader = self.leaders[who]
        # The ancestors of what is reserved do not go for it.
        chain = {(self.epoch, path[: i + 1]) for i in range(len(path))}
        others = [ref for ref in self.evictable() if self.node[ref] not in chain]
        room = len(self.made.raw.free(HOST)) + len(others)
        known = {**self.tree, **self.reserved_nodes()}
        found = leader.table.reserve(keys_of(path), 0, len(path), priority=priority)
        parent: int | None = None
        new = iter(found)
        missing = 0
        for i in range(len(path)):
            node = (self.epoch, path[: i + 1])
            if node in known:
                parent = known[node]
                continue
            ref = next(new, (None, None))[0]
            if ref is None:
                missing += 1
                continue
            assert missing == 0
            self.node[ref], self.parent[ref] = node, parent
            leader.reserved.append(ref)
            parent = ref
        assert next(new, None) is None
        self.forget_evicted()
        # What the other leader returned a moment ago may be found a moment later.
        assert not missing or found or not room or leader.failed
        leader.failed = missing > 0

    @rule(who=LEADERS, count=st.integers(1, 8))
    def publish(self, who: int, count: int) -> None:
        leader = self.leaders[who]
        refs = leader.reserved[:count]
        expected = []
        for ref in refs:
            parent = self.parent[ref]
            if parent is None or self.tree.get(self.node[parent]) == parent:
                self.tree[self.node[ref]] = ref
                expected.append(ref)
        assert leader.table.publish(refs) == len(expected)
        for ref in expected:
            leader.reserved.remove(ref)
            leader.pins[ref] += 1

    @rule(who=LEADERS, data=st.data())
    def abandon(self, who: int, data: st.DataObject) -> None:
        leader = self.leaders[who]
        if leader.reserved:
            refs = data.draw(st.lists(st.sampled_from(leader.reserved), unique=True))
            assert leader.table.abandon_reserved(refs)
            leader.reserved = [ref for ref in leader.reserved if ref not in refs]

    @rule(who=LEADERS)
    def reset(self, who: int) -> None:
        self.epoch += 1
        count = 0
        while gone := self.evictable():
            for ref in gone:
                del self.tree[self.node[ref]]
                count += 1
        assert self.leaders[who].table.reset() == count

    @precondition(lambda self: self.node)
    @rule(who=LEADERS, data=st.data())
    def use_stale_references(self, who: int, data: st.DataObject) -> None:
        live = {*self.tree.values(), *self.reserved_nodes().values()}
        stale = sorted(set(self.node) - live)
        if stale:
            before = self.made.raw.blocks()
            refs = data.draw(st.lists(st.sampled_from(stale), min_size=1))
            table = self.leaders[who].table
            for ref in refs:
                table.unpin(ref)
                assert not table.is_current(ref)
            assert table.publish(refs) == 0
            assert table.abandon_reserved(refs)
            assert self.made.raw.blocks() == before

    # ---- invariants -----------------------------------------------------------------------------
    @invariant()
    def the_segment_and_the_dictionary_agree(self) -> None:
        raw = self.made.raw
        raw.check_invariants()
        blocks = raw.blocks()
        states = dict.fromkeys(self.tree.values(), REGISTERED)
        states.update(dict.fromkeys(self.reserved_nodes().values(), PARTIAL))
        for ref, state in states.items():
            self.check_block(ref, blocks[block_of(ref)], state)
        live = [i for i, block in enumerate(blocks) if block.state in (PARTIAL, REGISTERED)]
        assert sorted(block_of(ref) for ref in states) == live
        for leader in getattr(self, "leaders", []):
            expected = Counter({block_of(ref): n for ref, n in leader.pins.items()})
            expected.update(block_of(ref) for ref in leader.reserved)
            assert Counter(leader.table.held()) == expected

    def check_block(self, ref: int, block: Block, state: int) -> None:
        """I3, I5 and what else the dictionary knows of one block."""
        epoch, path = self.node[ref]
        digest = keys_of(path).identity(len(path) - 1, epoch)[0]
        assert (block.state, block.generation) == (state, generation_of(ref))
        assert block.digest == self.identity.setdefault((block_of(ref), block.generation), digest)
        assert block.digest == digest
        holders = {
            i for i, each in enumerate(self.leaders) if each.pins[ref] or ref in each.reserved
        }
        assert block.holders == holders
        parent = self.parent[ref]
        assert block.parent == (None if parent is None else block_of(parent))

    def teardown(self) -> None:
        try:
            for leader in getattr(self, "leaders", []):
                leader.table.abandon_reserved(leader.reserved)
                for ref in leader.pins.elements():
                    leader.table.unpin(ref)
            self.made.prove()
        finally:
            self.made.remove()


TwoLeaders.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestTwoLeaders = TwoLeaders.TestCase
