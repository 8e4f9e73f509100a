# SPDX-License-Identifier: Apache-2.0
"""A named cache and the lives of its engine: a normal stop, a start, a start with other weights.

After `kill -9`: test_sharing.py.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench.vllm_lab.compare import compare
from bench.vllm_lab.engine import run_engine
from bench.vllm_lab.model import ModelShape, make_model
from bench.vllm_lab.processes import KVBM_PREFIX, SHARED_MEMORY, existing_names
from bench.vllm_lab.results import RunResult
from bench.vllm_lab.workload import Replay, ResetPrefixCache, Send
from tests.e2e.lab import Lab, assert_same_outputs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

WEIGHTS = "model.safetensors"
REFUSED = "cached content is not used, starting clean: "


@dataclass
class Lives:
    """Three engines, one after the other, with one cache and one model folder."""

    cold: RunResult
    left: list[str]  # names in /dev/shm after the first one's end
    warm: RunResult
    warm_log: str
    other: RunResult  # the weights were replaced before it
    other_log: str


@pytest.fixture(scope="module")
def lives(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Run them."""
    name, folder = f"e2e-{uuid.uuid4().hex[:12]}", tmp_path_factory.mktemp("restart")
    model = folder / "model"
    shutil.copytree(make_model(folder, ModelShape()), model)
    settings = lab.with_kvbm(environment={"DYN_KVBM_INSTANCE": name})
    settings = replace(settings, model=model)
    sent = lab.last_prompts()

    def run(log: Path, *more: Replay | ResetPrefixCache) -> RunResult:
        return run_engine(settings, [Send("sent", sent), *more], log)

    try:
        cold = run(folder / "cold.log")
        left = existing_names(cold.shared_objects)
        warm = run(folder / "warm.log")
        shutil.copy(make_model(folder, ModelShape(), seed=1) / WEIGHTS, model / WEIGHTS)
        forget = ResetPrefixCache("forget", connector=False)
        other = run(folder / "other.log", forget, Replay("again", "sent"))
        logs = [(folder / f"{which}.log").read_text() for which in ("warm", "other")]
        yield Lives(cold, left, warm, logs[0], other, logs[1])
    finally:
        for path in SHARED_MEMORY.glob(f"{KVBM_PREFIX}{name}*"):
            path.unlink()


def test_after_a_normal_stop_the_first_request_is_served_from_the_cache(
    lab: Lab, lives: Lives
) -> None:
    assert lives.left == list(lives.cold.shared_objects) != []
    assert lives.warm.shared_objects == lives.cold.shared_objects
    assert_same_outputs(lab.reference(), lives.cold["sent"], lives.warm["sent"])
    first = lives.warm["sent"].requests[0]
    assert lives.cold["sent"].requests[0].cached_tokens == 0
    assert first.cached_tokens > 0.9 * len(first.prompt)
    assert REFUSED not in lives.warm_log


def test_other_weights_at_the_same_place_refuse_the_content_and_start_clean(
    lab: Lab, lives: Lives
) -> None:
    lines = [line for line in lives.other_log.splitlines() if REFUSED in line]
    assert len(lines) == 1, lives.other_log
    found, _, wanted = lines[0].partition("this process needs")
    assert "weights=" in found
    assert "weights=" in wanted
    assert "model=" not in lines[0]
    sent, again = lives.other["sent"], lives.other["again"]
    assert sent.requests[0].cached_tokens == 0
    assert not compare(lab.reference().of_turns(sent.requests[0].turn), sent).equal
    assert compare(sent, again).equal
    assert again.requests[0].cached_tokens > 0.9 * len(again.requests[0].prompt)
