# SPDX-License-Identifier: Apache-2.0
"""`verify` holds for sound segments, also while they are at work, and names what was broken."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvbm._fast.keys import Keys
from kvbm.inspect.capture import capture
from kvbm.inspect.decode import Segment
from kvbm.inspect.verify import ALWAYS, check, verify
from kvbm.inspect.verify_rest import REST_CHECKS
from kvbm.inspect.violations import listed
from tests.fast.actors import actor, hold_reserved_and_pinned
from tests.fast.instances import cache, digests
from tests.fast.raw_segment import (
    EVICTING,
    HOST,
    PARTIAL,
    READY,
    REGISTERED,
    RawSegment,
)
from tests.inspect.conftest import Inspect
from tests.inspect.samples import Sample
from tests.small_engine import SmallEngine

Break = Callable[[RawSegment], None]


def word(state: int, holders: int, children: int, generation: int) -> int:
    return state << 61 | holders << 45 | children << 24 | generation


def put_word(block: int, value: int) -> Break:
    return lambda raw: raw.put_u64(raw.block_at(block), value)


def put_block(block: int, offset: int, value: int) -> Break:
    return lambda raw: raw.put_u64(raw.block_at(block) + offset, value)


def free_bit(pool: int, bit: int, value: int) -> Break:
    def change(raw: RawSegment) -> None:
        at = raw.at[f"pool {pool}"]
        raw.put_u64(at, raw.u64(at) & ~(1 << bit) | value << bit)

    return change


def put_operation(offset: int, value: int) -> Break:
    return lambda raw: raw.put_u64(raw.operation_at(0, 0) + offset, value)


# The sample: 0-5 and 6-9 a chain, 10-11 below 5, 12-14 and 15-19 chains, 20-22 being filled.
BROKEN: dict[str, tuple[str, Break]] = {
    "the parent is free": ("I1", put_word(1, word(0, 0, 0, 1))),
    "the parent has another generation": ("I1", put_block(2, 36 - 4, 2 | 9 << 32)),
    "the parent is no block": ("I1", put_block(2, 32, 5000)),
    "the parent is another block": ("I1", put_block(9, 32, 2 | 0 << 32)),
    "a child is not counted": ("I2", put_word(5, word(REGISTERED, 0, 1, 0))),
    "two blocks have one slot": ("I4", put_block(7, 40, READY << 60 | 6)),
    "a slot does not exist": ("I4", put_block(7, 40, READY << 60 | 64)),
    "a slot in use is free": ("I4", free_bit(HOST, 7, 1)),
    "a record in use is free": ("I4", free_bit(0, 7, 1)),
    "a registered block is not filled": ("I6", put_block(9, 40, 1 << 60 | 9)),
    "bytes of another life": ("I6", put_block(9, 40, READY << 60 | 7 << 32 | 9)),
    "a state that does not exist": ("words", put_word(9, word(6, 0, 0, 0))),
    "two owners fill a block": ("words", put_word(22, word(PARTIAL, 3, 0, 0))),
    "a free block is held": ("words", put_word(50, word(0, 1, 0, 0))),
    "a block with children is not registered": ("words", put_word(20, word(PARTIAL, 1, 2, 0))),
    "an operation in no known state": ("operations", put_operation(0, 9 << 60)),
    "an operation of no kind": ("operations", put_operation(8, 7 | 3 << 32)),
    "a complete operation with pending ranks": ("operations", put_operation(0, 4 << 60)),
    "a row without a block": ("operations", put_operation(192 + 8, 999)),
    "a ring with too many entries": ("rings", lambda raw: raw.put_u32(raw.at["rings"], 4000)),
    "a ring entry of no operation": ("rings", lambda r: r.put_u64(r.at["rings"] + 128, 500)),
    "a line with the role of another": ("lines", lambda raw: raw.put_u32(raw.line_at(0) + 4, 2)),
    "slots usable that do not exist": ("header", lambda raw: raw.put_u32(256, 65)),
    "a child too many is counted": ("exact counts", put_word(9, word(REGISTERED, 0, 1, 0))),
    "a block is left evicting": ("half done", put_word(9, word(EVICTING, 1, 0, 1))),
    "a holder that is not alive": ("half done", put_word(9, word(REGISTERED, 1 << 5, 0, 0))),
    "a block being filled by one who died": ("half done", put_word(20, word(PARTIAL, 32, 0, 0))),
    "a slot is lost": ("lost", free_bit(HOST, 40, 0)),
    "free slots cannot be found": ("lost", lambda raw: raw.put_u64(raw.at["summary 1"], 0)),
    "a block that is not indexed": ("index", put_block(9, 8, 12345)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_named(what: str, sample: Sample) -> None:
    rule, change = BROKEN[what]
    assert check(Segment(capture(sample.name))).violations == []
    with sample.instance.writable() as raw:
        change(raw)
    assert rule in {v.rule for v in check(Segment(capture(sample.name))).violations}


def test_a_violation_is_a_line_and_the_status_1(sample: Sample, inspect: Inspect) -> None:
    with sample.instance.writable() as raw:
        BROKEN["a slot in use is free"][1](raw)
    result = inspect("verify", sample.name)
    assert result.exit_code == 1
    assert "violated     I4: host slot 7 is free and named by a block" in result.stdout
    document = json.loads(inspect("verify", sample.name, "--json").stdout)
    assert not document["holds"]
    assert [violation["rule"] for violation in document["violations"]] == ["I4"]


def test_each_rule_is_broken_by_some_test() -> None:
    broken = {rule for rule, _ in BROKEN.values()}
    assert broken >= {*ALWAYS, *REST_CHECKS} - {"pools"}


def test_a_free_slot_beyond_the_end_is_named(sample: Sample) -> None:
    taken = capture(sample.name)
    data = bytearray(taken.data)
    data[24:28] = (40).to_bytes(4, "little")  # fewer slots than the pool's word has bits
    found = check(Segment(replace(taken, data=bytes(data)))).violations
    assert "pools" in {violation.rule for violation in found}


def test_many_violations_of_one_sort_are_counted(sample: Sample) -> None:
    with sample.instance.writable() as raw:
        for block in range(64):
            raw.put_u64(raw.block_at(block), word(7, 0, 0, 0))
    found = [v.text for v in verify(sample.name)[1].violations if v.rule == "words"]
    assert len(found) == 21
    assert found[-1].startswith("44 more, the first: block 20 ")


def test_a_segment_in_which_somebody_died_is_checked_for_what_must_hold_anyway(
    sample: Sample, inspect: Inspect
) -> None:
    with actor(hold_reserved_and_pinned, sample.instance.name) as one:
        one.result()
        one.kill()
        result = inspect("verify", sample.name)
        assert result.exit_code == 0
        assert "what died on lines [1] has not been recovered" in result.stdout
        listed = json.loads(inspect("participants", sample.name, "--dead", "--json").stdout)
        dead = listed["participants"]
    assert [(line["line"], line["pins"]) for line in dead] == [(1, 7)]


def test_a_block_that_its_leader_fills_without_an_operation_breaks_no_rule(
    sample: Sample,
) -> None:
    refs = [ref for ref, _ in sample.table.reserve(Keys(digests(3, "filled by hand")), 0, 3)]
    try:
        verdict = verify(sample.name)[1]
    finally:
        sample.table.abandon_reserved(refs)
    assert len(refs) == 3
    assert "half done" in verdict.checked
    assert verdict.violations == []


def test_a_violation_that_moved_between_two_readings_is_not_the_same() -> None:
    wrong = np.array([False, True])
    found = [
        next(listed("I1", wrong, lambda b: f"block {b} is wrong", np.array(words, np.uint64)))
        for words in ([0, 7], [0, 8], [9, 7])
    ]
    assert found[0].text == found[1].text
    assert found[0].key != found[1].key
    assert found[0].key == found[2].key


def test_a_segment_at_work_is_not_said_to_be_broken(sample: Sample) -> None:
    stop = threading.Event()
    rounds = []

    def work() -> None:
        table = sample.table
        while not stop.is_set():
            cache(table, Keys(digests(30, len(rounds) % 7)))
            rounds.append(1)

    worker = threading.Thread(target=work, name="kvbm-test-work")
    worker.start()
    try:
        verdicts = [verify(sample.name)[1] for _ in range(10)]
    finally:
        stop.set()
        worker.join()
    assert len(rounds) > 10
    assert [v for verdict in verdicts for v in verdict.violations] == []


def test_the_headers_of_the_slots_are_compared(engine: SmallEngine) -> None:
    engine.store("request", range(4))
    verdict = verify(engine.instance)[1]
    assert verdict.violations == []
    assert "I6 (arenas)" in verdict.checked
    taken = capture(engine.instance, slot_headers=True)
    head = bytearray(taken.arenas[0])
    head[4096 + 2 * 64 + 8] ^= 1  # one bit of the digest in the third slot's header
    broken = check(Segment(replace(taken, arenas={0: bytes(head)})))
    assert [violation.rule for violation in broken.violations] == ["I6 (arenas)"]
    assert "slot 2 " in broken.violations[0].text


@pytest.mark.parametrize(
    ("generations", "somebody_worked", "holds"),
    [(1, True, True), (1, False, False), (-1, True, False)],
)
def test_a_slot_that_got_a_newer_block_during_a_snapshot_is_no_violation(
    engine: SmallEngine, generations: int, somebody_worked: bool, holds: bool
) -> None:
    engine.store("request", range(4))
    taken = capture(engine.instance, slot_headers=True)
    head = bytearray(taken.arenas[0])
    at = 4096 + 2 * 64  # the third slot's header, whose first word ends with the generation
    generation = int.from_bytes(head[at : at + 4], "little") + generations
    head[at : at + 4] = (generation % 2**32).to_bytes(4, "little")
    locked = taken.locked if somebody_worked else frozenset()
    snapshot = replace(taken, kind="snapshot", arenas={0: bytes(head)}, locked=locked)
    verdict = check(Segment(snapshot))
    assert (verdict.violations == []) is holds
    assert ("I6 (arenas): 1 slots written during the snapshot" in verdict.unchecked) is holds
