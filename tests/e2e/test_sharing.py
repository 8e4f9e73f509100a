# SPDX-License-Identifier: Apache-2.0
"""Named caches: they outlive their engine, and engines share them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from bench.vllm_lab.processes import KVBM_PREFIX, SHARED_MEMORY, existing_names
from bench.vllm_lab.workload import Chat, Replay, Send
from tests.e2e.lab import LAST_TURN, TRAFFIC, Lab, assert_same_outputs
from tests.e2e.test_processes import START_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
def instance() -> Iterator[dict[str, str]]:
    """Environment with the name of a cache, which is removed at the end."""
    name = f"e2e-{uuid.uuid4().hex[:12]}"
    yield {"DYN_KVBM_INSTANCE": name}
    for path in SHARED_MEMORY.glob(f"{KVBM_PREFIX}{name}*"):
        path.unlink()


def test_an_engine_finds_the_cache_of_a_killed_one_warm(lab: Lab, instance: dict[str, str]) -> None:
    settings = lab.with_kvbm(environment=instance)
    with lab.start(settings, [Chat("killed", TRAFFIC), Replay("never done", "killed")]) as engine:
        engine.wait_for(lambda message: message[0] == "phase", START_S)
        names = engine.mapped_names()
        engine.kill()
    assert existing_names(names) == list(names) != []
    run = lab.run(settings, Send("warm", lab.last_prompts()))
    assert_same_outputs(lab.reference(), run["warm"])
    assert run.shared_objects == names
    first = run["warm"].requests[0]
    assert first.cached_tokens > 0.9 * len(first.prompt)


def test_an_engine_hits_what_another_one_stores_meanwhile(
    lab: Lab, instance: dict[str, str]
) -> None:
    settings = lab.with_kvbm(environment=instance)
    with lab.start(settings, [Chat("chat", TRAFFIC), Replay("again", "chat")]) as engine:
        engine.wait_for(lambda message: message[0] == "phase", START_S)
        guest = lab.run(settings, Send("guest", lab.last_prompts()))
        host = engine.result()
    assert_same_outputs(lab.reference(), host["chat"], host["again"], guest["guest"])
    assert guest.shared_objects == host.shared_objects
    first = guest["guest"].requests[0]
    assert first.cached_tokens > 0.9 * len(first.prompt)


def test_the_last_turn_is_long_enough_to_tell_a_warm_cache(lab: Lab) -> None:
    assert all(prompt.turn == LAST_TURN for prompt in lab.last_prompts())
    assert min(len(prompt.tokens) for prompt in lab.last_prompts()) > 300
