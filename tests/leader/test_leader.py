# SPDX-License-Identifier: Apache-2.0
"""The leader on a real segment, with real workers and copies."""

from __future__ import annotations

import pytest

from kvbm._fast.keys import Keys
from kvbm.leader.leader import MATCH_STEPS, STORE_ATTEMPTS
from kvbm.leader.load_failures import FAILURES_IN_A_ROW
from tests.engines import MakeEngine
from tests.fast.instances import digests
from tests.small_engine import SmallEngine


# ---- match and load ------------------------------------------------------------------------------
@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_what_was_stored_comes_back_in_all_ranks_and_groups(
    make_engine: MakeEngine, ranks: int, groups: int
) -> None:
    engine = make_engine(ranks=ranks, groups=groups)
    engine.store("first", [1, 2, 3])
    engine.load("second", [10, 11, 12])
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == set()
    for rank in range(ranks):
        assert engine.values([10, 11, 12], rank) == [1, 2, 3]


def test_a_match_ends_where_the_content_parts(engine: SmallEngine) -> None:
    engine.store("first", [1, 2, 3])
    hashes = digests(2) + digests(2, "other")
    sequence = engine.leader.track("second", [Keys(hashes)])
    assert engine.leader.match(sequence, 0, 4) == 2
    assert engine.leader.match(sequence, 1, 4) == 1
    assert engine.leader.match(sequence, 0, 1) == 1
    assert engine.leader.match(sequence, 2, 4) == 0


def test_nothing_is_cached_for_a_prompt_shorter_than_a_block(engine: SmallEngine) -> None:
    sequence = engine.track("short", 0)
    engine.place(sequence, [1])
    engine.leader.store(sequence, 0)
    assert engine.leader.match(sequence, 0, 0) == 0
    assert not engine.leader.finish("short", 0)


def test_a_match_is_held_once_however_often_it_is_asked_for(engine: SmallEngine) -> None:
    engine.store("first", [1, 2])
    sequence = engine.track("second", 2)
    for _ in range(3):
        assert engine.leader.match(sequence, 0, 2) == 2
    assert list(engine.leader.table.held().values()) == [1]
    engine.leader.drop_match(sequence)
    assert engine.leader.table.held() == {}


def test_a_match_that_is_not_used_is_let_go_after_some_steps(engine: SmallEngine) -> None:
    engine.store("first", [1, 2])
    sequence = engine.track("second", 2)
    engine.leader.match(sequence, 0, 2)
    for _ in range(MATCH_STEPS):
        engine.step()
        assert engine.leader.table.held()
    engine.step()
    assert engine.leader.table.held() == {}


def test_a_load_long_after_its_match_finds_the_blocks_again(engine: SmallEngine) -> None:
    engine.store("first", [1, 2])
    sequence = engine.track("second", 2)
    engine.leader.match(sequence, 0, 2)
    engine.leader.drop_match(sequence)
    engine.place(sequence, [10, 11])
    engine.leader.load(sequence, 2)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.values([10, 11]) == [1, 2]


def test_a_load_whose_match_was_evicted_is_reported_as_failed(make_engine: MakeEngine) -> None:
    engine = make_engine(host_slots=2)
    engine.store("first", [1, 2])
    sequence = engine.track("second", 2)
    engine.leader.match(sequence, 0, 2)
    engine.leader.drop_match(sequence)
    engine.store("third", [3, 4], seed="other")  # takes both slots
    engine.place(sequence, [10, 11])
    engine.leader.load(sequence, 2)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == {10, 11}


def test_a_shorter_load_than_matched_leaves_the_rest(engine: SmallEngine) -> None:
    engine.store("first", [1, 2, 3])
    sequence = engine.track("second", 3)
    assert engine.leader.match(sequence, 0, 3) == 3
    engine.place(sequence, [10, 11, 12])
    engine.leader.load(sequence, 2)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.values([10, 11, 12]) == [1, 2, 0]


def test_a_load_with_too_few_device_blocks_is_reported_as_failed(engine: SmallEngine) -> None:
    engine.store("first", [1, 2, 3])
    sequence = engine.track("second", 3)
    engine.leader.match(sequence, 0, 3)
    engine.place(sequence, [10, 11])
    engine.leader.load(sequence, 3)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == {10, 11}
    assert engine.values([10, 11]) == [0, 0]


def test_a_load_that_was_never_planned_can_be_reported_as_failed(engine: SmallEngine) -> None:
    engine.leader.fail_load("unknown", [4, 5])
    engine.run_until(lambda: "unknown" in engine.received)
    assert engine.missing == {4, 5}


def test_a_load_that_raises_is_reported_as_failed(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.store("first", [1, 2])
    sequence = engine.track("second", 2)
    engine.leader.match(sequence, 0, 2)
    engine.place(sequence, [10, 11])
    monkeypatch.setattr(engine.leader, "_submit_load", lambda *_: 1 // 0)
    engine.leader.load(sequence, 2)
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == {10, 11}


def test_while_a_load_runs_nothing_of_the_request_is_matched_or_stored(
    engine: SmallEngine,
) -> None:
    engine.store("first", [1, 2])
    sequence = engine.load("second", [10, 11])
    assert engine.leader.match(sequence, 0, 2) == 0
    engine.leader.store(sequence, 2)
    assert sequence.stores == []
    engine.run_until(lambda: "second" in engine.received)


# ---- loads that fail -----------------------------------------------------------------------------
def damage(engine: SmallEngine, value: float, rank: int = 0) -> int:
    """Change one element of the host copies of blocks that were filled with a value."""
    arena = engine.workers[rank].arena._map
    assert arena is not None
    hits = 0
    for layer in range(2):
        wanted = engine.caches[rank].arrays[layer].dtype.type(value + 1000 * layer + 100_000 * rank)
        row = wanted.tobytes() * 48
        at = arena.find(row)
        while at >= 0:
            arena[at] ^= 0x55
            hits += 1
            at = arena.find(row, at + 1)
    return hits


def test_damaged_bytes_are_refused_and_left_out_of_later_matches(make_engine: MakeEngine) -> None:
    engine = make_engine(verify_host=True)
    engine.store("first", [1, 2, 3])
    assert damage(engine, 2.0) > 0
    sequence = engine.load("second", [10, 11, 12])
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == {11, 12}
    assert engine.values([10]) == [1]
    assert engine.leader.match(sequence, 0, 3) == 0  # it is being recomputed
    third = engine.track("third", 3)
    assert engine.leader.match(third, 0, 3) == 1


@pytest.mark.parametrize("failed", [True, False], ids=["load failed", "aborted"])
def test_blocks_are_left_out_when_the_engine_fails_the_request_not_when_it_was_aborted(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    engine = make_engine(verify_host=True)
    engine.store("first", [1, 2, 3])
    damage(engine, 2.0)
    engine.load("second", [10, 11, 12])
    note_ended = engine.leader.loads_ended

    def loads_ended(received: set[str], missing: set[int]) -> None:
        if "second" in received:
            engine.leader.finish("second", 0, load_failed=failed)
        note_ended(received, missing)

    monkeypatch.setattr(engine.leader, "loads_ended", loads_ended)
    engine.run_until(lambda: "second" in engine.received)
    third = engine.track("third", 3)
    assert engine.leader.match(third, 0, 3) == (1 if failed else 3)


def test_a_load_that_the_engine_takes_for_failed_is_not_tried_again(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.store("first", [1, 2])
    sequence = engine.load("second", [10, 11])
    note_ended = engine.leader.loads_ended
    monkeypatch.setattr(
        engine.leader, "loads_ended", lambda ids, blocks: note_ended(ids, blocks, ids)
    )
    engine.run_until(lambda: "second" in engine.received)
    assert not engine.missing
    assert engine.leader.match(sequence, 0, 2) == 0
    assert engine.leader.match(engine.track("third", 2), 0, 2) == 2


def test_damage_in_one_rank_fails_the_load_in_all(make_engine: MakeEngine) -> None:
    engine = make_engine(ranks=2, verify_host=True)
    engine.store("first", [1, 2, 3])
    assert damage(engine, 3.0, rank=1) > 0
    engine.load("second", [10, 11, 12])
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == {12}
    third = engine.track("third", 3)
    assert engine.leader.match(third, 0, 3) == 2


def test_after_a_failed_load_the_request_is_stored_from_where_the_cache_ends(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(verify_host=True)
    engine.store("first", [1, 2])
    damage(engine, 1.0)
    sequence = engine.load("second", [10, 11])
    engine.run_until(lambda: "second" in engine.received)
    assert engine.missing == {10, 11}
    sequence.groups[0].keys = Keys(digests(3))
    engine.place(sequence, [10, 11, 12])
    engine.leader.store(sequence, 3)
    engine.step(lambda: engine.fill([10, 11, 12], 1))
    engine.run_until(lambda: not sequence.stores)
    assert engine.counter("published") == 3  # the third one follows


def test_loads_that_fail_in_a_row_pause_loading(make_engine: MakeEngine) -> None:
    engine = make_engine(verify_host=True)
    for number in range(FAILURES_IN_A_ROW + 1):
        engine.store(f"first {number}", [1, 2], seed=number, value=10 * number + 1)
    for number in range(FAILURES_IN_A_ROW):
        damage(engine, 10 * number + 1)
        engine.load(f"second {number}", [10, 11], seed=number)
        engine.run_until(lambda n=number: f"second {n}" in engine.received)
    last = engine.track("third", 2, seed=FAILURES_IN_A_ROW)
    assert engine.leader.match(last, 0, 2) == 0
    engine.leader.failures.succeeded()
    assert engine.leader.match(last, 0, 2) == 2


# ---- stores --------------------------------------------------------------------------------------
def test_a_store_waits_for_the_forward_pass_of_its_step(engine: SmallEngine) -> None:
    sequence = engine.track("first", 1)
    engine.place(sequence, [1])
    engine.leader.store(sequence, 1)
    metadata = engine.leader.build_step()
    engine.bind(metadata)
    assert not engine.workers[0].loop.rank_ended(sequence.stores[0])
    engine.fill([1], 7)  # the forward pass
    engine.output()
    engine.run_until(lambda: not sequence.stores)
    engine.load("second", [10])
    engine.run_until(lambda: "second" in engine.received)
    assert engine.values([10]) == [7]


def test_equal_blocks_of_many_requests_are_stored_once(engine: SmallEngine) -> None:
    sequences = [engine.track(f"request {i}", 4) for i in range(6)]
    for number, sequence in enumerate(sequences):
        engine.place(sequence, range(4 * number, 4 * number + 4))
        engine.leader.store(sequence, 4)
    engine.step(lambda: engine.fill(list(range(24))))
    engine.run_until(lambda: not any(s.stores for s in sequences))
    assert engine.counter("published") == 4


def test_a_prompt_longer_than_the_tier_is_stored_as_far_as_it_fits(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(host_slots=4)
    engine.store("long", list(range(10)))
    sequence = engine.track("again", 10)
    assert engine.leader.match(sequence, 0, 10) == 4


def test_only_requests_are_counted_as_look_ups(engine: SmallEngine) -> None:
    engine.store("first", range(6))
    sequence = engine.track("second", 8)
    assert engine.leader.match(sequence, 0, 8) == 6
    engine.leader.finish("second", 0)
    engine.store("third", range(10, 18))  # six of them are there
    counted = ("lookups", "lookup_blocks", "matched_blocks", "deduplicated")
    assert [engine.counter(name) for name in counted] == [1, 8, 6, 0]


def test_a_gap_left_by_a_preempted_request_is_closed_by_the_next(engine: SmallEngine) -> None:
    first = engine.track("first", 3)
    engine.place(first, [1, 2, 3])
    engine.leader.store(first, 3)
    second = engine.track("second", 4)
    engine.place(second, [1, 2, 3, 4])
    engine.leader.store(second, 4)  # only the last block is its own
    engine.leader.preempt("first")
    engine.step(lambda: engine.fill([1, 2, 3, 4]))
    engine.run_until(lambda: not second.stores)
    if engine.leader.finish("second", 4):
        engine.run_until(lambda: "second" in engine.sent)
    engine.run_until(lambda: not engine.leader.table.held())
    assert engine.leader.match(engine.track("third", 4), 0, 4) == 4


def test_preemption_stops_stores_before_their_blocks_are_overwritten(engine: SmallEngine) -> None:
    sequence = engine.track("first", 2)
    engine.place(sequence, [1, 2])
    engine.leader.store(sequence, 2)
    handles = list(sequence.stores)
    metadata = engine.leader.build_step()
    engine.bind(metadata)
    engine.leader.preempt("first")
    metadata = engine.step(lambda: engine.fill([1, 2], 77))
    assert metadata.stop == handles
    engine.run_until(lambda: not engine.leader.table.held())
    assert engine.leader.match(engine.track("second", 2), 0, 2) == 0
    assert sequence.groups[0].device_blocks == []


def test_a_preempted_request_begins_anew_and_may_load(engine: SmallEngine) -> None:
    engine.store("first", [1, 2, 3])
    sequence = engine.load("second", [10, 11, 12])
    engine.run_until(lambda: "second" in engine.received)
    engine.leader.preempt("second")
    engine.step()
    assert engine.leader.match(sequence, 0, 3) == 3
    engine.place(sequence, [20, 21, 22])
    engine.leader.load(sequence, 3)
    engine.run_until(lambda: engine.values([20, 21, 22]) == [1, 2, 3])
    engine.run_until(lambda: not sequence.loading)


def test_stores_that_fail_again_and_again_are_given_up(
    engine: SmallEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = engine.track("first", 2)
    engine.place(sequence, [1, 2])
    for _ in range(STORE_ATTEMPTS):
        engine.leader.store(sequence, 2)
        assert sequence.stores
        for handle in sequence.stores:
            engine.leader.table.cancel(handle)
        engine.run_until(lambda: not sequence.stores)
    engine.leader.store(sequence, 2)
    assert sequence.stores == []


def test_tokens_that_the_engine_takes_back_are_stored_under_their_new_keys(
    engine: SmallEngine,
) -> None:
    hashes = digests(3)
    sequence = engine.leader.track("session", [Keys(hashes)])
    engine.place(sequence, [1, 2, 3])
    engine.leader.store(sequence, 3)
    engine.step(lambda: engine.fill([1, 2, 3], 1))
    del hashes[1:]
    engine.leader.store(sequence, 1)
    hashes += digests(2, "new")
    engine.leader.store(sequence, 3)
    engine.step(lambda: engine.fill([2, 3], 8))
    engine.run_until(lambda: not sequence.stores)
    other = engine.leader.track("other", [Keys(digests(1) + digests(2, "new"))])
    assert engine.leader.match(other, 0, 3) == 3


# ---- end of a request ----------------------------------------------------------------------------
def test_a_finished_request_keeps_its_device_blocks_until_its_stores_have_ended(
    engine: SmallEngine,
) -> None:
    sequence = engine.track("first", 2)
    engine.place(sequence, [1, 2])
    engine.leader.store(sequence, 2)
    metadata = engine.leader.build_step()
    assert engine.leader.finish("first", 2)
    assert engine.leader.holds_device_blocks
    engine.bind(metadata)
    engine.fill([1, 2])
    engine.output()
    engine.run_until(lambda: "first" in engine.sent)
    engine.run_until(lambda: not engine.leader.holds_device_blocks)
    assert engine.leader.sequences == {}
    assert engine.leader.match(engine.track("second", 2), 0, 2) == 2


def test_a_request_that_is_stored_already_keeps_nothing(engine: SmallEngine) -> None:
    engine.store("first", [1, 2])
    sequence = engine.track("second", 2)
    engine.place(sequence, [3, 4])
    engine.leader.store(sequence, 2)
    assert not engine.leader.finish("second", 2)
    assert not engine.leader.finish("second", 2)
    assert not engine.leader.finish("never seen", 2)


def test_a_request_aborted_while_it_loads_is_reported_and_holds_nothing(
    engine: SmallEngine,
) -> None:
    engine.store("first", [1, 2])
    engine.load("second", [10, 11])
    assert not engine.leader.finish("second", 2)  # the engine waits for the load by itself
    assert engine.leader.holds_device_blocks
    engine.run_until(lambda: "second" in engine.received)
    assert not engine.leader.holds_device_blocks
    assert engine.leader.table.held() == {}
    assert "second" not in engine.sent


def test_a_request_preempted_and_loading_in_one_step_is_reported_once_when_aborted(
    engine: SmallEngine,
) -> None:
    engine.store("other", [1, 2])
    sequence = engine.track("first", 4)
    engine.place(sequence, [3, 4, 5, 6])
    engine.leader.store(sequence, 4)
    engine.leader.build_step()  # not bound: the stores are in flight
    engine.leader.preempt("first")
    assert engine.leader.match(sequence, 0, 4) == 2
    engine.place(sequence, [10, 11, 12, 13])
    engine.leader.load(sequence, 2)
    assert not engine.leader.finish("first", 2)
    engine.run_until(lambda: "first" in engine.received)
    engine.step()
    assert "first" not in engine.sent


def test_an_id_may_come_again_while_stores_of_its_first_request_run(engine: SmallEngine) -> None:
    first = engine.track("same", 2)
    engine.place(first, [1, 2])
    engine.leader.store(first, 2)
    metadata = engine.leader.build_step()
    engine.leader.finish("same", 2)
    second = engine.track("same", 2, seed="other")
    engine.place(second, [3, 4])
    engine.leader.store(second, 2)
    engine.bind(metadata)
    engine.fill([1, 2, 3, 4])
    engine.output()
    engine.run_until(lambda: not first.stores and not second.stores)
    assert engine.leader.sequences == {"same": second}


def test_an_abandoned_request_is_not_stored_and_holds_nothing(engine: SmallEngine) -> None:
    sequence = engine.track("first", 2)
    engine.place(sequence, [1, 2])
    engine.leader.store(sequence, 2)
    engine.leader.abandon("first")
    engine.leader.store(sequence, 2)
    engine.step(lambda: engine.fill([1, 2]))
    engine.run_until(lambda: not engine.leader.table.held())
    assert engine.counter("published") == 0
