# SPDX-License-Identifier: Apache-2.0
"""What requests live through, driven step by step: functions for `Call` phases.

They run in the engine's process, where engine core and worker are too, so that a test can look at
the scheduler between two steps and hold the copy thread still: "while it loads" and "while it
stores" are then states that last, not moments that have to be met. (vLLM before 0.22 has the
worker in a process of its own always: there nothing can be held, and the moments may be missed.)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.leaks import wait_until

READY_S = 60.0
STEPS_MAX = 20_000
OUTPUT_TOKENS = 40

Tokens = tuple[int, ...]


@dataclass
class Lives:
    """What came out: tokens and finish reason of each request, and what else was looked at."""

    outputs: dict[str, Tokens] = field(default_factory=dict)
    reasons: dict[str, str | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class StillLoop:
    """Stands in for the worker's loop and keeps step numbers back, so that no copy begins."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.kept: dict[str, tuple[Any, ...]] = {}

    def bind_step(self, *arguments: Any) -> None:
        self.kept["bind_step"] = arguments

    def fill_step(self, *arguments: Any) -> None:
        self.kept["fill_step"] = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def pass_on(self) -> None:
        """Give the loop the last step numbers."""
        for name, arguments in self.kept.items():
            getattr(self.loop, name)(*arguments)


class Driver:
    """An engine in this process, one step at a time."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.side = self.scheduler.connector._leader
        self.lives = Lives()
        self.tokens: dict[str, list[Tokens]] = {}
        self.open: set[str] = set()
        self.cached: dict[str, int] = {}
        # Before the arena is ready, the first request may find no slot to be stored in.
        segment = self.side.segment
        ranks, slots = range(segment.shape.ranks), segment.shape.host_slots
        assert wait_until(lambda: all(segment.ready_slots(r) == slots for r in ranks), READY_S)

    # ---- requests --------------------------------------------------------------------------------
    def add(
        self, name: str, prompt: Sequence[int], *, salt: str | None = None, **more: Any
    ) -> None:
        """Send a request."""
        from vllm import SamplingParams, TokensPrompt

        given = {"temperature": 0.0, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True} | more
        text = TokensPrompt(prompt_token_ids=list(prompt))
        if salt is not None:
            text["cache_salt"] = salt
        self.engine.add_request(name, text, SamplingParams(detokenize=False, **given))
        self.open.add(name)

    def abort(self, name: str) -> None:
        """Abort a request, as a client that goes away does."""
        self.engine.abort_request([name])
        self.open.discard(name)

    def request(self, name: str) -> Any:
        """The scheduler's request; vLLM may have made its id longer."""
        found = [r for i, r in self.scheduler.requests.items() if i == name or i[:-9] == name]
        return found[0] if found else None

    def status(self, name: str) -> str:
        """Status of a request as the scheduler calls it, "" if it is gone."""
        request = self.request(name)
        return "" if request is None else request.status.name

    def sequence(self, name: str) -> Any:
        """The leader's sequence of a request, None if it has none."""
        request = self.request(name)
        return None if request is None else self.side.leader.sequences.get(request.request_id)

    # ---- steps -----------------------------------------------------------------------------------
    def step(self) -> None:
        """One engine step; outputs are noted."""
        for output in self.engine.step():
            name = output.request_id
            self.tokens[name] = [tuple(sample.token_ids) for sample in output.outputs]
            self.cached[name] = output.num_cached_tokens or 0
            if output.finished:
                self.open.discard(name)
                self.lives.outputs[name] = self.tokens[name][0]
                self.lives.reasons[name] = output.outputs[0].finish_reason

    def step_until(self, condition: Callable[[], object]) -> None:
        """Step until the condition holds; fails if it never does."""
        for _ in range(STEPS_MAX):
            if condition():
                return
            self.step()
        raise AssertionError(f"not met after {STEPS_MAX} steps: {condition}")

    def finish(self) -> None:
        """Step until all requests have finished."""
        self.step_until(lambda: not self.open)

    def drain(self) -> int:
        """Step until the engine has nothing to do; return the device blocks then in use."""
        self.finish()
        for _ in range(STEPS_MAX):
            if not self.scheduler.has_requests():
                break
            self.core.step_fn()
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def forget(self, connector: bool) -> None:
        """Empty the engine's own cache, and that of the connector if asked."""
        self.drain()
        assert self.llm.reset_prefix_cache(reset_connector=connector)

    def counter(self, name: str) -> int:
        """One of the segment's counters."""
        return int(self.side.segment.counters()[name])

    # ---- the copy thread -------------------------------------------------------------------------
    @property
    def worker_side(self) -> Any:
        """The connector's worker side, None if it is in another process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        return get_kv_transfer_group()._worker if has_kv_transfer_group() else None

    @property
    def worker(self) -> Any:
        """The worker of this process, None if it is in another one."""
        side = self.worker_side
        return None if side is None else side._worker

    @contextmanager
    def copies_held(self) -> Iterator[None]:
        """Let no copy begin inside, if the worker is in this process."""
        worker = self.worker
        if worker is None:
            yield
            return
        assert worker.loop is not None
        still = StillLoop(worker.loop)
        worker.loop = still
        try:
            yield
        finally:
            worker.loop = still.loop
            still.pass_on()

    def end(self) -> Lives:
        """Finish, note what every test looks at, and return all of it."""
        self.lives.facts["in use"] = self.drain()
        self.lives.facts["held"] = len(self.side.leader.table.held())
        self.lives.facts["errors"] = self.counter("errors")
        self.lives.facts["could hold"] = self.worker is not None
        leader = self.side.leader
        self.lives.facts["tracked"] = len(leader.sequences) + len(leader._storing)
        return self.lives


def driven(function: Callable[..., None]) -> Callable[..., Lives]:
    """Make a function of a driver one of an LLM that returns what came out."""

    @functools.wraps(function)
    def call(llm: Any, *arguments: Any) -> Lives:
        driver = Driver(llm)
        function(driver, *arguments)
        return driver.end()

    return call


# ---- lives ---------------------------------------------------------------------------------------
@driven
def all_at_once(driver: Driver, prompts: Sequence[Tokens]) -> None:
    """All prompts together, cold, then again from the host."""
    driver.forget(connector=True)
    for number, prompt in enumerate(prompts):
        driver.add(f"cold {number}", prompt)
    driver.finish()
    driver.forget(connector=False)
    for number, prompt in enumerate(prompts):
        driver.add(f"warm {number}", prompt)
    driver.finish()
    driver.lives.facts["cached"] = [driver.cached[f"warm {n}"] for n in range(len(prompts))]


@driven
def same_prompt_many_times(driver: Driver, prompt: Tokens, times: int) -> None:
    """One prompt many times at once, cold, then from the host."""
    driver.forget(connector=True)
    before = driver.counter("published")
    for number in range(times):
        driver.add(f"cold {number}", prompt)
    driver.drain()
    driver.lives.facts["published"] = driver.counter("published") - before
    driver.forget(connector=False)
    for number in range(times):
        driver.add(f"warm {number}", prompt)
    driver.finish()
    driver.lives.facts["cached"] = [driver.cached[f"warm {n}"] for n in range(times)]


@driven
def aborted_while_waiting(driver: Driver, prompts: Sequence[Tokens]) -> None:
    """Abort before the first step."""
    for number, prompt in enumerate(prompts):
        driver.add(f"request {number}", prompt)
    driver.abort("request 1")
    driver.finish()


@driven
def aborted_while_loading(driver: Driver, prompt: Tokens, other: Tokens) -> None:
    """Abort while blocks come from the host; another request is served meanwhile."""
    driver.add("first", prompt)
    driver.finish()
    driver.forget(connector=False)
    with driver.copies_held():
        driver.add("loading", prompt)
        driver.step_until(lambda: driver.status("loading") == "WAITING_FOR_REMOTE_KVS")
        driver.abort("loading")
        driver.add("other", other)
        driver.step()
        driver.lives.facts["status"] = driver.status("loading")
    driver.finish()
    driver.forget(connector=False)
    driver.add("again", prompt)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["again"]


@driven
def aborted_while_running(driver: Driver, prompt: Tokens) -> None:
    """Abort after a few tokens; what it has stored is good."""
    driver.forget(connector=True)
    driver.add("running", prompt)
    driver.step_until(lambda: len(driver.tokens.get("running", [()])[0]) >= 5)
    driver.abort("running")
    driver.forget(connector=False)
    driver.add("again", prompt)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["again"]


@driven
def ended_while_storing(driver: Driver, prompt: Tokens, other: Tokens, abort: bool) -> None:
    """The request ends while its blocks are being stored: they stay until that is done."""
    driver.forget(connector=True)
    with driver.copies_held():
        driver.add("storing", prompt)
        if abort:
            driver.step_until(lambda: driver.tokens.get("storing"))
            driver.lives.facts["stores"] = len(driver.sequence("storing").stores)
            driver.abort("storing")
        driver.step_until(lambda: "storing" not in driver.open)
        for _ in range(5):
            driver.step()
        driver.lives.facts["kept"] = driver.side.leader.holds_device_blocks
        driver.add("other", other)
        driver.finish()
    driver.forget(connector=False)
    driver.add("again", prompt)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["again"]


@driven
def preempted(driver: Driver, prompts: Sequence[Tokens], hold: bool) -> None:
    """All running requests are preempted twice, with copies in flight if `hold`, and resumed."""
    driver.forget(connector=True)
    for number, prompt in enumerate(prompts):
        driver.add(f"request {number}", prompt)

    def preempt_all(tokens: int) -> None:
        driver.step_until(lambda: len(driver.tokens.get("request 0", [()])[0]) >= tokens)
        # With a step in flight vLLM says that it could not empty its own cache, since the blocks of
        # that step come free after it. The requests are preempted all the same.
        with suppress(RuntimeError):
            driver.llm.reset_prefix_cache(reset_running_requests=True)

    if hold:
        with driver.copies_held():
            preempt_all(3)
            for _ in range(3):
                driver.step()
    else:
        preempt_all(3)
    preempt_all(10)
    driver.finish()
    driver.lives.facts["loads"] = driver.counter("loads")
    driver.forget(connector=False)
    for number, prompt in enumerate(prompts):
        driver.add(f"again {number}", prompt)
    driver.finish()


@driven
def reset_while_running(driver: Driver, prompt: Tokens) -> None:
    """The cache is emptied while a request runs: what it computed before is not stored after."""
    driver.forget(connector=True)
    driver.add("running", prompt)
    driver.step_until(lambda: len(driver.tokens.get("running", [()])[0]) >= 5)
    driver.lives.facts["reset"] = driver.llm.reset_prefix_cache(reset_connector=True)
    driver.drain()
    driver.forget(connector=False)
    driver.add("again", prompt)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["again"]


@driven
def reset_while_loading(driver: Driver, prompt: Tokens) -> None:
    """The cache is emptied while blocks of it are being loaded."""
    driver.add("first", prompt)
    driver.finish()
    driver.forget(connector=False)
    with driver.copies_held():
        driver.add("loading", prompt)
        driver.step_until(lambda: driver.status("loading") == "WAITING_FOR_REMOTE_KVS")
        driver.llm.reset_prefix_cache(reset_connector=True)
    driver.finish()
    driver.forget(connector=False)
    driver.add("again", prompt)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["again"]


@driven
def parallel_samples(driver: Driver, prompt: Tokens, samples: int) -> None:
    """Several samples of one prompt, cold and from the host; top-k 1 makes them all greedy."""
    from vllm.sampling_params import RequestOutputKind

    final = RequestOutputKind.FINAL_ONLY
    greedy = {"n": samples, "temperature": 0.5, "top_k": 1, "output_kind": final}
    for name, connector in (("cold", True), ("warm", False)):
        driver.forget(connector)
        driver.add(name, prompt, **greedy)
        driver.finish()
        driver.lives.facts[name] = driver.tokens[name]


@driven
def short_prompts(driver: Driver, prompt: Tokens, lengths: Sequence[int]) -> None:
    """Prompts around the size of a block, cold and from the host."""
    driver.forget(connector=True)
    for name, connector in (("cold", True), ("warm", False)):
        driver.forget(connector)
        for length in lengths:
            driver.add(f"{name} {length}", prompt[:length], max_tokens=3)
        driver.finish()
    driver.lives.facts["cached"] = {n: driver.cached[f"warm {n}"] for n in lengths}


@driven
def prompt_logprobs(driver: Driver, prompt: Tokens) -> None:
    """A request for the logprobs of its prompt, which no cache can answer."""
    driver.add("first", prompt)
    driver.finish()
    driver.forget(connector=False)
    driver.add("logprobs", prompt, prompt_logprobs=1)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["logprobs"]


@driven
def salted(driver: Driver, prompt: Tokens) -> None:
    """Equal prompts with different salts share nothing."""
    driver.forget(connector=True)
    for name, salt in (("none", None), ("a", "a"), ("b", "b")):
        driver.add(name, prompt, salt=salt)
        driver.drain()
    driver.forget(connector=False)
    for name, salt in (("none again", None), ("a again", "a"), ("b again", "b"), ("c", "c")):
        driver.add(name, prompt, salt=salt)
        driver.finish()
    driver.lives.facts["cached"] = dict(driver.cached)


@driven
def paused(driver: Driver, prompt: Tokens) -> None:
    """The engine is paused as for new weights, in the middle of requests, and goes on."""
    driver.forget(connector=True)
    driver.add("aborted", prompt)
    driver.step_until(lambda: driver.tokens.get("aborted"))
    driver.lives.facts["held before"] = driver.side.leader.holds_device_blocks
    driver.abort("aborted")
    driver.drain()
    driver.core.pause_scheduler("abort", clear_cache=True)
    if "reset_connector" not in inspect.signature(driver.core._reset_caches).parameters:
        # vLLM before 0.22 empties its own cache only; the manual says what to call in addition.
        driver.llm.reset_prefix_cache(reset_connector=True)
    driver.core.resume_scheduler()
    driver.add("after", prompt)
    driver.finish()
    driver.lives.facts["cached"] = driver.cached["after"]
