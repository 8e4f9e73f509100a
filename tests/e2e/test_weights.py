# SPDX-License-Identifier: Apache-2.0
"""Content of old weights is never served after new ones came and the cache was reset.

Outputs after an update are those of an engine without kvbm that was started with the new weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.vllm_lab.compare import LOGPROB_TOLERANCE
from bench.vllm_lab.model import ModelShape, make_model
from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Call, Send
from tests.e2e import weights
from tests.e2e.lab import LAST_TURN, Lab
from tests.e2e.lives import OUTPUT_TOKENS, Lives, Tokens

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SEED = 1  # of the new weights
CHUNK = 96
MOMENTS = {
    "idle": weights.updated_when_idle,
    "storing": weights.updated_while_storing,
    "loading": weights.updated_while_loading,
    "running": weights.updated_while_running,
}
ORDERS = ("weights", "reset")
LEVELS = (1, 2)


@dataclass(frozen=True)
class Weights:
    """Two directories with weights, a prompt, and what an engine generates for it with each."""

    old: Path
    new: Path
    prompt: Tokens
    old_output: Tokens
    new_output: Tokens


@pytest.fixture(scope="module")
def both(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    before = lab.reference().of_turns(LAST_TURN).requests[0]
    new = make_model(tmp_path_factory.mktemp("weights"), ModelShape(), seed=SEED)
    run = lab.run(lab.plain(model=new), Send("new", (before.as_prompt(),), OUTPUT_TOKENS))
    (after,) = run["new"].requests
    assert after.margin > LOGPROB_TOLERANCE
    assert after.output != before.output
    return Weights(lab.plain().model, new, before.prompt, before.output, after.output)


@pytest.fixture(scope="module")
def run(lab: Lab, both: Weights) -> RunResult:
    """One engine in its caller's process, in which all of it happens."""
    given = (both.prompt, both.old, both.new)
    settings = lab.with_kvbm(
        environment={"DYN_KVBM_VERIFY_HOST": "1"},
        max_num_batched_tokens=CHUNK,
        logprobs=False,
    )
    return lab.run(
        settings,
        *(
            Call(f"{moment} {first}", function, (*given, first))
            for moment, function in MOMENTS.items()
            for first in ORDERS
        ),
        Call("paused", weights.paused_at_once, given),
        *(Call(f"slept {level}", weights.slept, (*given, level)) for level in LEVELS),
    )


def life(run: RunResult, name: str) -> Lives:
    """What came out of one of them."""
    value = run[name].value
    assert isinstance(value, Lives)
    return value


def assert_served_by_the_new_weights(lived: Lives, both: Weights) -> None:
    assert lived.outputs["after"] == both.new_output
    assert lived.facts["cached"] == 0
    left = {fact: lived.facts[fact] for fact in ("in use", "held", "tracked", "errors")}
    assert left == {"in use": 0, "held": 0, "tracked": 0, "errors": 0}


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_after_an_update_and_a_reset_outputs_are_those_of_the_new_weights(
    run: RunResult, both: Weights, moment: str, first: str
) -> None:
    lived = life(run, f"{moment} {first}")
    assert_served_by_the_new_weights(lived, both)
    if moment in ("idle", "storing"):
        assert lived.outputs["before"] == both.old_output
    assert lived.facts["answer"] == (moment == "idle")


@pytest.mark.parametrize("name", ["paused", "slept 1", "slept 2"])
def test_pause_and_sleep_in_the_callers_process_are_refused_while_blocks_are_kept(
    run: RunResult, both: Weights, name: str
) -> None:
    lived = life(run, name)
    assert lived.facts["kept"]
    assert lived.facts["refused"]
    assert lived.facts.get("asleep", True)
    assert lived.outputs["before"] == both.old_output
    assert_served_by_the_new_weights(lived, both)


def test_sleep_at_once_is_answered_by_an_engine_in_processes_of_its_own(
    lab: Lab, both: Weights
) -> None:
    given = (both.prompt, both.old, both.new)
    run = lab.run(
        lab.with_kvbm(worker_processes=True, logprobs=False),
        *(Call(f"level {level}", weights.sleep_between_turns, (*given, level)) for level in LEVELS),
    )
    for level in LEVELS:
        lived = life(run, f"level {level}")
        assert lived.outputs == {"before": both.old_output, "after": both.new_output}
        assert lived.facts == {
            "cached before": 0,
            "asleep before": True,
            "cached after": 0,
            "asleep after": True,
        }
