# SPDX-License-Identifier: Apache-2.0
"""Damaged segments: what can be decoded is, what cannot is said, and nothing fails or hangs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvbm.inspect import changes, detail, picture, report, text, tree
from kvbm.inspect.capture import Capture, capture
from kvbm.inspect.decode import Segment
from kvbm.inspect.verify import check
from tests.fast.raw_segment import RawSegment
from tests.inspect.samples import Sample

SEEDS = range(12)


def run_every_report(segment: Segment) -> None:
    """What all commands do with a segment, up to the last character."""
    list(text.summary_lines(report.summary(segment)))
    chosen = report.select_blocks(segment, report.Filter(sort="age", descending=True))
    list(text.table(text.BLOCK_COLUMNS, report.block_rows(segment, chosen)))
    list(text.table(text.OPERATION_COLUMNS, report.operation_rows(segment)))
    list(text.table(text.PARTICIPANT_COLUMNS, report.participant_rows(segment)))
    whole = tree.tree_of(segment)
    for node in tree.nodes(whole):
        assert tree.branch(node) or not node.last
        tree.node_row(segment, node)
    for block in [*chosen[:5], *chosen[-5:]]:
        list(text.detail_lines(detail.detail(segment, int(block))))
    for colour in picture.COLOURS:
        list(picture.svg(picture.draw_tiers(segment, colour)))
    list(picture.svg(picture.draw_tree(segment, "state")))
    list(text.change_lines(changes.changes(segment, segment), 3))
    check(segment)


def scribbled(taken: Capture, seed: int) -> Capture:
    """Random words in random places, most of them in the parts that decide."""
    choose = random.Random(seed)
    data = bytearray(taken.data)
    tail = len(data) - 4096 * 7  # pools, index, blocks, cold records of the small sample
    for _ in range(choose.choice([5, 50, 2000])):
        begin, end = choose.choice([(128, 4096), (4096, 200_000), (tail, len(data))])
        at = choose.randrange(begin, end - 8) & ~3
        value = choose.choice([0, 1, 2**64 - 1, choose.getrandbits(64), choose.randrange(70)])
        data[at : at + 8] = value.to_bytes(8, "little")
    return replace(taken, data=bytes(data))


@pytest.fixture(scope="module")
def taken(frozen_file: Path) -> Capture:
    return capture(str(frozen_file))


@pytest.mark.parametrize("seed", SEEDS)
def test_scribbled_words_break_no_report(seed: int, taken: Capture) -> None:
    segment = Segment(scribbled(taken, seed))
    run_every_report(segment)
    assert len(segment.blocks) == 64


SPOILED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "too few for a header"),
    "half a header": (lambda data: data[:2000], "too few for a header"),
    "a header alone": (lambda data: data[:4096], "participants: 0 of 272 records are there"),
    "cut in the operations": (lambda data: data[:1_000_000], "operations: "),
    "cut in the blocks": (lambda data: data[:-5000], "blocks: "),
    "zeros": (lambda data: bytes(len(data)), "carries no magic"),
    "ones": (lambda data: b"\xff" * len(data), "impossible sizes"),
    "no magic": (lambda data: bytes(8) + data[8:], "carries no magic"),
    "another format": (lambda data: data[:8] + b"\x63" + data[9:], "it has format 99/"),
    "no ranks": (lambda data: data[:28] + bytes(4) + data[32:], "impossible sizes"),
    "huge sizes": (
        lambda data: data[:16] + b"\xff\xff\xff\x7f" * 3 + data[28:],
        "blocks: 0 of 2147483647 records",
    ),
    "text": (lambda data: b"not a segment " * 1000, "carries no magic"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_missing_is_said_and_the_rest_is_decoded(how: str, taken: Capture) -> None:
    spoil, problem = SPOILED[how]
    segment = Segment(replace(taken, data=spoil(taken.data)))
    run_every_report(segment)
    assert check(segment).violations
    assert any(problem in text for text in segment.damage), segment.damage
    assert report.state_of(segment) in ("damaged", "in use")


def test_a_scribbled_shape_still_shows_who_is_attached(taken: Capture) -> None:
    data = taken.data[:28] + bytes(4) + taken.data[32:]
    segment = Segment(replace(taken, data=data))
    lines = list(report.participant_rows(segment))
    assert [(line["role"], line["pid"]) for line in lines] == [
        ("leader", 4711),
        ("worker", 4711),
        ("worker", 4711),
    ]
    assert segment.counters()["reserved"] == 23


def test_a_ring_of_parents_is_bounded_and_counted(sample: Sample) -> None:
    with sample.instance.writable() as raw:
        raw.put_u32(raw.block_at(0) + 32, 4)  # block 0 below block 3, its own descendant
    segment = Segment(capture(sample.name))
    whole = tree.tree_of(segment)
    assert whole.unreachable == 12
    assert sum(root.total for root in whole.roots) == 11
    assert [one["block"] for one in detail.chain(segment, 5)] == [4, 3, 2, 1, 0, 3]
    run_every_report(segment)


def test_the_decoder_agrees_with_an_independent_reader(sample: Sample) -> None:
    segment = Segment(capture(sample.name))
    with RawSegment(sample.instance.name) as raw:
        for number, block in enumerate(raw.blocks()):
            row = report.block_row(segment, number)
            assert row["digest"] == block.digest.hex()
            assert row["generation"] == block.generation
            assert set(row["holders"]) == block.holders
            assert row["children"] == block.children
            assert row["parent"] == block.parent
            assert (row["priority"], row["tick"]) == (block.priority, block.tick)
            sequence_hash, position, group, registered_ns, uses, _ = raw.cold(number)
            assert (row["position"], row["group"]) == (position, group)
            assert int(row["sequence_hash"], 16) == sequence_hash
            assert int(segment.blocks.registered_ns[number]) == registered_ns
            assert int(segment.blocks.uses[number]) == uses
        for pool, name in enumerate(("blocks", "host", "disk")):
            assert set(segment.free(name).nonzero()[0].tolist()) == raw.free(pool)
        operation = raw.operation(0, 0)
        row = report.operation_row(segment, 0, with_rows=True)
        assert [tuple(one.values()) for one in row["rows"]] == [
            (r.device_block, r.slot, r.block, r.generation) for r in operation.rows
        ]
        assert (row["step"], int(row["request"], 16)) == (operation.step, operation.request_key)
        head, tail, _ = raw.ring(0, 1)
        queued = [line["queued"] for line in report.participant_rows(segment)]
        assert queued == [None, 1, head - tail]
