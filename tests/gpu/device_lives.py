# SPDX-License-Identifier: Apache-2.0
"""Functions for `Call` phases, in an engine's process, that need a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.e2e.lives import Driver, Tokens, driven
from tests.e2e.load_faults import cached
from tests.gpu.failing_driver import FailingDriver
from tests.gpu.memory import torch_with_cuda

SLEEP_CYCLES = 40_000_000  # about 20 ms


class SlowCopies:
    """Stands in for the worker's loop: its copies come about 20 ms behind the engine's stream.

    The copies of a step are submitted at once and wait on the device, while the engine goes on: so
    what is in flight stays so for several steps.
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.stopped_in_flight = 0
        self._torch = torch_with_cuda()
        self._side = self._torch.cuda.Stream()

    def _behind(self) -> int:
        """Handle of a stream that is behind the engine's, and then some."""
        idle = self._side.query()
        self._side.wait_stream(self._torch.cuda.current_stream())
        if idle:
            with self._torch.cuda.stream(self._side):
                self._torch.cuda._sleep(SLEEP_CYCLES)
        return int(self._side.cuda_stream)

    def bind_step(self, step: int, _stream: int = 0) -> None:
        self.loop.bind_step(step, self._behind())

    def fill_step(self, step: int, _stream: int = 0) -> None:
        self.loop.fill_step(step, self._behind())

    def cancel_and_wait(self, handle: int, timeout_ms: int, stream: int = 0) -> bool:
        self.stopped_in_flight += not self.loop.rank_ended(handle)
        return bool(self.loop.cancel_and_wait(handle, timeout_ms, stream))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)


class EarlyStores(SlowCopies):
    """The same with stores that do not wait for a forward pass, which is late."""

    def bind_step(self, step: int, _stream: int = 0) -> None:
        self.loop.bind_step(step, _stream)
        self._torch.cuda._sleep(SLEEP_CYCLES)

    def fill_step(self, step: int, _stream: int = 0) -> None:
        self.loop.fill_step(step, int(self._side.cuda_stream))


def slow_copies(llm: Any) -> None:
    """From here on copies are slow."""
    worker = Driver(llm).worker
    worker.loop = SlowCopies(worker.loop)


def early_stores(llm: Any) -> None:
    """From here on stores read what the forward pass has not written yet."""
    worker = Driver(llm).worker
    worker.loop = EarlyStores(worker.loop)


def copies_are_normal(llm: Any) -> int:
    """End that; returns how many stores were stopped in flight."""
    worker = Driver(llm).worker
    slow, worker.loop = worker.loop, worker.loop.loop
    return int(slow.stopped_in_flight)


@driven
def load_with_cuda_errors(
    driver: Driver, prompt: Tokens, other: Tokens, kind: str, times: int
) -> None:
    """A load meets errors of the driver, beside another request; then it is asked for again."""
    cached(driver, prompt)
    failed, cuda = driver.counter("loads_failed"), FailingDriver()
    cuda.fail(kind, times)
    driver.add("loaded", prompt)
    driver.add("other", other)
    driver.finish()
    driver.drain()
    driver.lives.facts["left"] = cuda.left
    cuda.fail(kind, 0)
    driver.lives.facts["loads failed"] = driver.counter("loads_failed") - failed
    driver.forget(connector=False)
    driver.add("again", prompt)
    driver.finish()


@driven
def the_tier_gives_up(driver: Driver, prompts: Sequence[Tokens]) -> None:
    """All stores fail, more in a row than the backend takes; the engine goes on without it."""
    driver.forget(connector=True)
    cuda = FailingDriver()
    cuda.fail("copy", 1000)
    for when in ("lost", "after"):
        for number, prompt in enumerate(prompts):
            driver.add(f"{when} {number}", prompt)
            driver.finish()
        driver.lives.facts[f"off, {when}"] = driver.worker._rank_copies.backend.is_switched_off
        driver.drain()
        assert driver.llm.reset_prefix_cache(reset_connector=False)
        cuda.fail("copy", 0)
