# SPDX-License-Identifier: Apache-2.0
"""What was computed before is found and comes back byte for byte, on all ranks.

The forward pass of these engines looks at all KV that it computes from; the fixture asserts that
none was wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.trtllm_integration.engine import BLOCK, Engine, Request

Serve = Callable[..., Engine]
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
WHOLE = 4 * BLOCK


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("interface", ["1.2", "1.3"], indirect=True)
def test_a_prompt_is_found_again_after_the_device_has_lost_it(serve: Serve, overlap: bool) -> None:
    engine = serve(overlap=overlap)
    first = engine.serve(Request(1, list(PROMPT), max_new=3))
    assert engine.loaded[1] == 0
    second = engine.serve(Request(2, list(PROMPT), max_new=3))
    assert engine.loaded[2] == WHOLE
    assert second.tokens == first.tokens
    assert engine.counter("blocks_loaded") == 4
    assert engine.counter("errors") == 0


def test_the_ranks_each_get_their_own_part_back(serve: Serve) -> None:
    engine = serve(ranks=2)
    engine.serve(Request(1, list(PROMPT)))
    engine.serve(Request(2, list(PROMPT)))
    assert engine.loaded[2] == WHOLE


@pytest.mark.parametrize("interface", ["1.2"], indirect=True)
def test_an_engine_that_does_not_wait_at_its_start_finds_the_cache_open(serve: Serve) -> None:
    engine = serve(waits=False)
    engine.serve(Request(1, list(PROMPT)))  # too early, perhaps
    engine.wait_until_ready()
    engine.serve(Request(2, [7, *PROMPT]))
    engine.serve(Request(3, [7, *PROMPT]))
    assert engine.loaded[3] == WHOLE


def test_the_last_token_is_computed_in_any_case(serve: Serve) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    engine.serve(Request(2, PROMPT[:WHOLE]))
    assert engine.loaded[2] == WHOLE - BLOCK


def test_blocks_of_a_request_that_still_runs_are_found(serve: Serve) -> None:
    engine = serve()
    first = engine.add(Request(1, list(PROMPT), max_new=500))
    engine.step()
    engine.run_until(lambda: engine.counter("published") >= 4)
    engine.serve(Request(2, list(PROMPT)))
    assert first.state == "generation"
    assert engine.loaded[2] == WHOLE


@pytest.mark.parametrize("overlap", [False, True])
def test_generated_blocks_are_found_in_the_next_turn(serve: Serve, overlap: bool) -> None:
    engine = serve(overlap=overlap)
    first = engine.serve(Request(1, list(PROMPT), max_new=2 * BLOCK))
    engine.serve(Request(2, [*first.tokens, 5, 6]))
    # The last token has no KV when the request ends, all others have.
    assert engine.loaded[2] == (len(first.tokens) - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("chunk", [BLOCK - 3, BLOCK, 2 * BLOCK + 1])
def test_a_prompt_that_is_computed_in_chunks_is_stored_as_a_whole(serve: Serve, chunk: int) -> None:
    engine = serve(chunk=chunk)
    engine.serve(Request(1, list(PROMPT)))
    engine.serve(Request(2, [*PROMPT, *PROMPT]))  # its second half is computed in chunks
    assert engine.loaded[2] == WHOLE
    engine.serve(Request(3, [*PROMPT, *PROMPT]))
    assert engine.loaded[3] == 9 * BLOCK


def test_a_request_that_has_part_of_a_block_on_the_device_loads_nothing(serve: Serve) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    for computed in (1, BLOCK - 1, BLOCK + 3):
        found = engine.scheduler.get_num_new_matched_tokens(Request(2, list(PROMPT)), computed)
        assert found == (0, False)
    assert engine.scheduler.get_num_new_matched_tokens(Request(2, list(PROMPT)), BLOCK) == (
        WHOLE - BLOCK,
        True,
    )


def test_what_the_device_has_lacks_nothing_of_what_is_loaded_behind_it(serve: Serve) -> None:
    engine = serve(reuse=True)
    engine.serve(Request(1, list(PROMPT)))
    engine.filed = {t: block for t, block in engine.filed.items() if len(t) <= 2 * BLOCK}
    engine.serve(Request(2, list(PROMPT)))
    assert engine.loaded[2] == 2 * BLOCK


def test_blocks_that_a_request_found_on_the_device_are_not_stored_from_it(serve: Serve) -> None:
    engine = serve(reuse=True)
    engine.serve(Request(1, list(PROMPT)))
    engine.side.leader.reset()
    engine.serve(Request(2, [*PROMPT[:WHOLE], *range(100, 100 + 2 * BLOCK)]))
    assert engine.loaded[2] == 0
    engine.filed.clear()
    engine.serve(Request(3, [*PROMPT[:WHOLE], *range(100, 100 + 2 * BLOCK)]))
    assert engine.loaded[3] == 0


def test_blocks_are_kept_until_their_copies_have_ended_also_in_an_idle_engine(serve: Serve) -> None:
    engine = serve()
    request = engine.add(Request(1, list(PROMPT)))
    engine.step()
    assert request.state == "finished"
    if engine.saving:  # else its copies were faster than the step
        assert request.blocks
    engine.run_until(lambda: not engine.saving)  # nothing is scheduled meanwhile
    assert not request.blocks


def test_a_full_tier_costs_hits_and_nothing_else(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "3")
    engine = serve()
    for number in range(1, 6):
        engine.serve(Request(number, list(PROMPT) if number % 2 else [9, *PROMPT]))
    assert all(tokens <= 3 * BLOCK for tokens in engine.loaded.values())


@pytest.mark.parametrize(
    ("ranks", "reuse", "overlap"),
    [(1, False, False), (1, False, True), (2, False, True), (1, True, False)],
)
def test_random_lives_compute_from_right_kv_only(
    serve: Serve, ranks: int, reuse: bool, overlap: bool
) -> None:
    """Cancels without a word included, where freed blocks are not found on the device again."""
    engine = serve(ranks=ranks, reuse=reuse, overlap=overlap, blocks=40, chunk=13)
    chance = random.Random(ranks + 2 * reuse)
    prefixes = [[n + 1] * (BLOCK * chance.randrange(1, 5)) for n in range(4)]
    number = 0
    for _ in range(250):
        if len(engine.active) < 4:
            number += 1
            tokens = [*chance.choice(prefixes), *[chance.randrange(2)] * chance.randrange(1, 12)]
            engine.add(Request(number, tokens, max_new=chance.randrange(1, 14)))
        if not reuse and engine.active and chance.random() < 0.1:
            engine.cancel(chance.choice(engine.active))
        engine.step()
    loaded = sum(engine.loaded.values())
    for request in list(engine.active):
        engine.cancel(request)
    engine.run_until(lambda: not (engine.saving or engine.loading))
    assert loaded > 0
    assert engine.counter("errors") == 0
