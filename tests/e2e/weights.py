# SPDX-License-Identifier: Apache-2.0
"""New weights, sleep and pause: functions for `Call` phases.

Each begins with the weights that it is given as `old` and an empty cache. New ones are loaded by
the worker's own `reload_weights`, of which no connector is told.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.lives import OUTPUT_TOKENS, Driver, Lives, Tokens, driven

REPEATS_MAX = 10_000


def load(llm: Any, weights: Path) -> None:
    """Load the weights of another directory into the running engine."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})


def reset_until_true(llm: Any) -> None:
    """What the manual says for an engine in the caller's process."""
    for _ in range(REPEATS_MAX):
        if llm.reset_prefix_cache(reset_connector=True):
            return
        llm.llm_engine.step()
    raise AssertionError("the answer is never true")


def begin(driver: Driver, old: Path) -> None:
    """The old weights, and nothing cached."""
    load(driver.llm, old)
    driver.forget(connector=True)


def ask(driver: Driver, prompt: Tokens) -> None:
    """One request more; what it found cached is a fact."""
    driver.add("after", prompt)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["after"]


def update(driver: Driver, new: Path, first: str) -> None:
    """New weights, and a reset before or after them; its answer is a fact."""
    if first == "weights":
        load(driver.llm, new)
    driver.lives.facts["answer"] = driver.llm.reset_prefix_cache(reset_connector=True)
    if first == "reset":
        load(driver.llm, new)


# ---- an engine in this process -------------------------------------------------------------------
@driven
def updated_when_idle(driver: Driver, prompt: Tokens, old: Path, new: Path, first: str) -> None:
    """Everything has been stored."""
    begin(driver, old)
    driver.add("before", prompt)
    driver.drain()
    update(driver, new, first)
    ask(driver, prompt)


@driven
def updated_while_storing(driver: Driver, prompt: Tokens, old: Path, new: Path, first: str) -> None:
    """The blocks of a finished request are still to be stored."""
    begin(driver, old)
    with driver.copies_held():
        driver.add("before", prompt)
        driver.finish()
        driver.lives.facts["kept"] = driver.side.leader.holds_device_blocks
        update(driver, new, first)
    reset_until_true(driver.llm)
    ask(driver, prompt)


@driven
def updated_while_loading(driver: Driver, prompt: Tokens, old: Path, new: Path, first: str) -> None:
    """Blocks of the old weights are coming from the host to a request, whose own output is mixed.

    What that request stores afterwards is not asked for: the cache is reset again when it is done.
    """
    begin(driver, old)
    driver.add("before", prompt)
    driver.drain()
    driver.forget(connector=False)
    with driver.copies_held():
        driver.add("loading", prompt)
        driver.step_until(lambda: driver.status("loading") == "WAITING_FOR_REMOTE_KVS")
        update(driver, new, first)
    driver.drain()
    driver.forget(connector=False)
    ask(driver, prompt)


@driven
def updated_while_running(driver: Driver, prompt: Tokens, old: Path, new: Path, first: str) -> None:
    """A request runs on over the update; nothing of it is stored any more."""
    begin(driver, old)
    driver.add("running", prompt)
    driver.step_until(lambda: len(driver.tokens.get("running", [()])[0]) >= 5)
    update(driver, new, first)
    driver.drain()
    driver.forget(connector=False)
    ask(driver, prompt)


def at_once(driver: Driver, prompt: Tokens, call: Callable[[], object]) -> None:
    """Call right after the end of a request whose blocks are being stored; what it says."""
    with driver.copies_held():
        driver.add("before", prompt)
        driver.finish()
        driver.lives.facts["kept"] = driver.side.leader.holds_device_blocks
        try:
            call()
            driver.lives.facts["refused"] = False
        except RuntimeError:
            driver.lives.facts["refused"] = True


@driven
def paused_at_once(driver: Driver, prompt: Tokens, old: Path, new: Path) -> None:
    """`pause_scheduler` is refused while blocks are kept, and the engine is none the worse."""
    begin(driver, old)
    at_once(driver, prompt, lambda: driver.core.pause_scheduler("abort", clear_cache=True))
    reset_until_true(driver.llm)
    driver.core.pause_scheduler("abort", clear_cache=True)
    load(driver.llm, new)
    driver.core.resume_scheduler()
    ask(driver, prompt)


@driven
def slept(driver: Driver, prompt: Tokens, old: Path, new: Path, level: int) -> None:
    """`sleep` is refused while blocks are kept; after a reset it is not."""
    begin(driver, old)
    at_once(driver, prompt, lambda: driver.llm.sleep(level=level))
    reset_until_true(driver.llm)
    driver.llm.sleep(level=level)
    driver.lives.facts["asleep"] = driver.engine.is_sleeping()
    load(driver.llm, new)
    driver.llm.wake_up()
    ask(driver, prompt)


# ---- an engine in processes of its own -----------------------------------------------------------
def sleep_between_turns(llm: Any, prompt: Tokens, old: Path, new: Path, level: int) -> Lives:
    """Generate, sleep at once, load new weights, wake up, generate."""
    from vllm import SamplingParams, TokensPrompt

    lives = Lives()
    load(llm, old)
    greedy = SamplingParams(
        temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False
    )
    for name in ("before", "after"):
        (output,) = llm.generate(
            TokensPrompt(prompt_token_ids=list(prompt)), greedy, use_tqdm=False
        )
        lives.outputs[name] = tuple(output.outputs[0].token_ids)
        lives.facts[f"cached {name}"] = output.num_cached_tokens or 0
        llm.sleep(level=level)
        lives.facts[f"asleep {name}"] = llm.llm_engine.is_sleeping()
        if name == "before":
            load(llm, new)
        llm.wake_up()
    return lives
