# SPDX-License-Identifier: Apache-2.0
"""Two engines with one cache: what both need is moved once, and neither needs the other's life."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.vllm_lab.engine import Message
from bench.vllm_lab.processes import KVBM_PREFIX, SHARED_MEMORY
from bench.vllm_lab.results import RunResult
from bench.vllm_lab.settings import EngineSettings
from bench.vllm_lab.workload import Call, Phase, Prompt, ResetPrefixCache, Send
from kvbm._fast.segment import Segment
from tests.e2e import sharing
from tests.e2e.lab import LAST_TURN, Lab, assert_same_outputs
from tests.e2e.test_processes import START_S
from tests.fast.raw_segment import RawSegment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


BLOCK = 32


def unique_name() -> Iterator[str]:
    """Name of a cache; what has it, or one that begins so, is removed at the end."""
    name = f"e2e-{uuid.uuid4().hex[:12]}"
    yield name
    for path in SHARED_MEMORY.glob(f"{KVBM_PREFIX}{name}*"):
        path.unlink()


@pytest.fixture
def name() -> Iterator[str]:
    """Name of a cache of the test's own."""
    yield from unique_name()


def with_instance(lab: Lab, name: str, **changes: Any) -> EngineSettings:
    """Settings of an engine that uses the cache of that name."""
    return lab.with_kvbm(environment={"DYN_KVBM_INSTANCE": name}, **changes)


def counters(name: str) -> dict[str, int]:
    """What all engines of an instance have done, after their end."""
    segment = Segment.attach(f"/{KVBM_PREFIX}{name}", writable=False)
    found = segment.counters()
    segment.close()
    return found


def assert_nothing_held(name: str) -> None:
    """Fail unless the segment is whole, and nobody is left in it."""
    with RawSegment(f"/{KVBM_PREFIX}{name}") as raw:
        raw.check_invariants()
        raw.check_idle()


def phase(name: str) -> Callable[[Message], bool]:
    """Whether a message says that this phase has ended."""
    return lambda message: message[0] == "phase" and message[1].name == name


# ---- the same traffic ----------------------------------------------------------------------------
def test_two_engines_with_the_same_traffic_copy_what_one_copies(
    lab: Lab, name: str, tmp_path: Path
) -> None:
    sent = lab.last_prompts()
    single = f"{name}-single"
    alone = lab.run(
        with_instance(lab, single),
        Call("ready", sharing.ready),
        Send("alone", sent),
        Call("stored", sharing.finish_stores),
    )
    with sharing.gates(tmp_path, 1) as (start,):
        phases: list[Phase] = [
            Call("ready", sharing.ready),
            Call("start", sharing.wait_at, (start.path,)),
            Send("both", sent),
            Call("stored", sharing.finish_stores),
        ]
        settings = with_instance(lab, name)
        with lab.start(settings, phases) as one, lab.start(settings, phases) as other:
            for engine in (one, other):
                engine.wait_for(phase("ready"), START_S)
            start.open()
            results = [engine.result() for engine in (one, other)]
    assert_same_outputs(lab.reference(), alone["alone"], *(run["both"] for run in results))
    wanted, found = counters(single), counters(name)
    assert wanted["bytes_stored"] > 0
    # Two inserts of one digest can miss each other when a third comes between, and a child may be
    # copied before its parent is there (docs/protocol.md): single blocks, rarely.
    for moved in ("bytes_stored", "blocks_stored", "published"):
        assert wanted[moved] <= found[moved] <= 1.02 * wanted[moved], moved
    assert_nothing_held(name)


# ---- one waits for the other, and outlives it ----------------------------------------------------
@dataclass
class Story:
    """What came of it; requests in the order of `lab.last_prompts()`."""

    prompts: tuple[Prompt, ...]
    served: RunResult
    stored: dict[str, Any]  # by the engine that is killed
    name: str


@pytest.fixture(scope="module")
def story_name() -> Iterator[str]:
    """Name of the cache of the story, which is removed at its end."""
    yield from unique_name()


@pytest.fixture(scope="module")
def story(lab: Lab, story_name: str, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """One engine stores, another one asks for it; the first stores more, and is killed there."""
    name = story_name
    settings = with_instance(lab, name, device_blocks=128)
    sent = lab.last_prompts()
    tokens = [prompt.tokens for prompt in sent]
    with sharing.gates(tmp_path_factory.mktemp("gates"), 5) as (ask, copy, beside, killed, never):
        storing: list[Phase] = [
            Call("stores", sharing.begin_to_store, (tokens[:1],)),
            Call("is asked", sharing.wait_at, (copy.path,)),
            Call("copied", sharing.copy_at_last),
            Call("stores more", sharing.begin_to_store, (tokens[1:4],)),
            Call("dies", sharing.wait_at, (never.path,)),
        ]
        serving: list[Phase] = [
            Call("asks", sharing.wait_at, (ask.path,)),
            Call("waits", sharing.ask, (tokens[0],)),
            Call("received", sharing.receive),
            Call("goes on", sharing.wait_at, (beside.path,)),
            Send("beside", sent),
            Call("alone", sharing.wait_at, (killed.path,)),
            Call("recovered", sharing.serve_until_recovered, (tokens[0],)),
            ResetPrefixCache("forget", connector=False),
            Send("after", sent),
            ResetPrefixCache("forget again", connector=False),
            Send("again", sent),
        ]
        with lab.start(settings, storing) as first, lab.start(settings, serving) as second:
            stored = {"reserved": first.wait_for(phase("stores"), START_S)[1].value}
            ask.open()
            second.wait_for(phase("waits"), START_S)
            copy.open()
            stored["outputs"] = first.wait_for(phase("copied"), START_S)[1].value
            second.wait_for(phase("received"), START_S)
            stored["reserved more"] = first.wait_for(phase("stores more"), START_S)[1].value
            beside.open()
            second.wait_for(phase("beside"), START_S)
            first.kill()
            killed.open()
            served = second.result()
    return Story(sent, served, stored, name)


def test_a_request_for_what_another_engine_stores_waits_and_loads_it(
    lab: Lab, story: Story
) -> None:
    prompt = story.prompts[0].tokens
    expected = lab.reference().of_turns(LAST_TURN).requests[0].output
    output, cached = story.served["received"].value
    assert story.stored["reserved"] > 0
    assert list(story.stored["outputs"].values()) == [expected]
    assert output == expected
    assert cached == (len(prompt) - 1) // BLOCK * BLOCK


def test_the_death_of_an_engine_that_stores_leaves_the_other_untouched(
    lab: Lab, story: Story
) -> None:
    assert story.stored["reserved more"] > 0
    phases = [story.served[name] for name in ("beside", "after", "again")]
    assert_same_outputs(lab.reference(), *phases)
    for request in story.served["again"].requests:
        assert request.cached_tokens > 0.9 * len(request.prompt)
    assert_nothing_held(story.name)
