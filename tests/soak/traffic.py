# SPDX-License-Identifier: Apache-2.0
"""Random traffic in an engine's process, and random disturbance of it.

A round is a function for a `Call` phase. It steps the engine for some seconds; between two steps
it sends requests, aborts some in a chosen state, preempts all, empties caches, holds the copy
thread still and breaks something. At its end everything is put right and the engine drained: then
nothing may be in use, and what its processes hold can be compared from round to round.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Any

from bench.vllm_lab.processes import existing_names, mapped_kvbm_names
from tests import leaks
from tests.e2e.lives import Driver
from tests.soak.faults import FAULTS, possible_faults
from tests.soak.pool import Known
from tests.soak.usage import Usage, engine_usage

MOST_OPEN = 24  # requests at a time; more than the engine runs
STUCK_S = 60.0  # without any request that ends; an idle machine takes a thousandth
MOST_STEPS = 8  # that a fault or a pause of the copy thread lasts
WRONG_MAX = 10  # outputs told in full
# How often something happens, a step.
ABORT, PREEMPT, RESET, HOLD, FAULT, NEW_LOAD = 0.03, 0.005, 0.006, 0.03, 0.015, 0.02
ABORT_STATES = ("waiting", "loading", "running", "storing", "preempted")


@dataclass
class Round:
    """What one round did and what was left after it."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    usage: Usage | None = None


class Traffic:
    """One round's traffic.

    Parameters
    ----------
    driver : Driver
        The engine.
    pool : sequence of Known
        Prompts and their outputs.
    choose : Random
        Decides everything.
    """

    def __init__(self, driver: Driver, pool: Sequence[Known], choose: Random) -> None:
        self.driver = driver
        self.pool = pool
        self.choose = choose
        self.round = Round()
        self._sent: dict[str, Known] = {}
        self._recent = [pool[0]]
        self._wanted = MOST_OPEN // 2
        self._number = 0
        self._windows: dict[str, tuple[int, ExitStack]] = {}
        self._progress_at = time.monotonic()

    def run(self, seconds: float) -> Round:
        """Step for so long, then come to rest."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._arrive()
            self._disturb()
            self._step()
        while self._windows:
            self._close(next(iter(self._windows)))
        while self.driver.open:
            self._step()
        self._come_to_rest()
        return self.round

    def _count(self, what: str, number: int = 1) -> None:
        self.round.counts[what] += number

    # ---- requests --------------------------------------------------------------------------------
    def _arrive(self) -> None:
        if self.choose.random() < NEW_LOAD:
            self._wanted = self.choose.randint(0, MOST_OPEN)
        if len(self.driver.open) < self._wanted:
            self._send(self._next())
        elif not self.driver.open:
            self._send(self._next())  # an engine with nothing to do makes no steps

    def _next(self) -> Known:
        """A conversation's next turn, the same prompt again, or any prompt."""
        how, last = self.choose.random(), self.choose.choice(self._recent)
        if how < 0.4:
            later = [
                known
                for known in self.pool
                if known.conversation == last.conversation and known.turn == last.turn + 1
            ]
            if later:
                return later[0]
        return last if how < 0.6 else self.choose.choice(self.pool)

    def _send(self, known: Known) -> None:
        self._recent = [*self._recent[-7:], known]
        self._number += 1
        name = f"soak-{self._number}"
        tokens = self.choose.randint(1, len(known.output))
        more: dict[str, Any] = {}
        if self.choose.random() < 0.05:
            more["prompt_logprobs"] = 1
        salt = "salt" if self.choose.random() < 0.1 else None
        self.driver.add(name, known.prompt, salt=salt, max_tokens=tokens, **more)
        self._sent[name] = known

    def _step(self) -> None:
        self.driver.step()
        self._count("steps")
        self._look_for_progress()
        for name, output in self.driver.lives.outputs.items():
            self._compare(name, output)
        self.driver.lives.outputs.clear()
        for name, steps in [(name, steps) for name, (steps, _) in self._windows.items()]:
            if steps <= 1:
                self._close(name)
            else:
                self._windows[name] = (steps - 1, self._windows[name][1])

    def _look_for_progress(self) -> None:
        now = time.monotonic()
        if self.driver.lives.outputs or not self.driver.open:
            self._progress_at = now
        if now - self._progress_at > STUCK_S:
            requests = self.driver.scheduler.requests
            states = {name: request.status.name for name, request in requests.items()}
            raise AssertionError(f"no request has ended for {STUCK_S} s: {states}")

    def _compare(self, name: str, output: tuple[int, ...]) -> None:
        known = self._sent.pop(name)
        self.driver.tokens.pop(name, None)
        self.driver.cached.pop(name, None)
        self._count("requests")
        self._count("prompt tokens", len(known.prompt))
        self._count("output tokens", len(output))
        if output and output == known.output[: len(output)]:
            return
        self._count("wrong outputs")
        if len(self.round.wrong) < WRONG_MAX:
            self.round.wrong.append(
                f"{name}, conversation {known.conversation}, turn {known.turn}: "
                f"{output} instead of {known.output[: len(output)]}"
            )

    # ---- disturbance -----------------------------------------------------------------------------
    def _disturb(self) -> None:
        chance = self.choose.random
        if chance() < ABORT:
            self._abort(self.choose.choice(ABORT_STATES))
        if chance() < PREEMPT:
            self._preempt_all()
        if chance() < RESET:
            self._reset()
        if chance() < HOLD and "hold" not in self._windows:
            self._open("hold", self.driver.copies_held())
            self._count("copies held")
        if chance() < FAULT and "fault" not in self._windows:
            name = self.choose.choice(possible_faults(self.driver))
            self._open("fault", FAULTS[name](self.driver, self.choose))
            self._count(f"fault {name}")

    def _open(self, name: str, context: Any) -> None:
        stack = ExitStack()
        stack.enter_context(context)
        self._windows[name] = (self.choose.randint(1, MOST_STEPS), stack)

    def _close(self, name: str) -> None:
        self._windows.pop(name)[1].close()

    def _state(self, name: str) -> str:
        status = self.driver.status(name)
        if status == "WAITING_FOR_REMOTE_KVS":
            return "loading"
        if status == "RUNNING":
            sequence = self.driver.sequence(name)
            return "storing" if sequence is not None and sequence.stores else "running"
        return status.lower()

    def _abort(self, state: str) -> None:
        there = [name for name in sorted(self.driver.open) if self._state(name) == state]
        if there:
            name = self.choose.choice(there)
            self.driver.abort(name)
            for notes in (self._sent, self.driver.tokens, self.driver.cached):
                notes.pop(name, None)
            self._count(f"aborted {state}")

    def _blocks_may_all_be_taken(self) -> bool:
        """Whether running requests alone have device blocks: vLLM cannot take those of others."""
        scheduler = self.driver.scheduler
        running = {request.request_id for request in scheduler.running}
        blocks_of = scheduler.kv_cache_manager.get_block_ids
        return not any(
            any(blocks_of(request)) for request in scheduler.requests if request not in running
        )

    def _preempt_all(self) -> None:
        if self._blocks_may_all_be_taken():
            self.driver.llm.reset_prefix_cache(reset_running_requests=True)
            self._count("preempted all")

    def _reset(self) -> None:
        connector = self.choose.random() < 0.3
        running = self.choose.random() < 0.3 and self._blocks_may_all_be_taken()
        self.driver.llm.reset_prefix_cache(
            reset_running_requests=running, reset_connector=connector
        )
        self._count("reset connector" if connector else "reset device")

    # ---- the end of a round ----------------------------------------------------------------------
    def _come_to_rest(self) -> None:
        driver = self.driver
        in_use = driver.drain()
        leader = driver.side.leader
        leader.collect()
        self.round.left = {
            "device blocks in use": in_use,
            "blocks held": len(leader.table.held()),
            "requests tracked": len(leader.sequences) + len(driver.side._known),
            "stores and loads": len(leader._storing) + len(leader._loading) + len(leader._late),
            "operations": len(leader._uncollected),
        }
        self.round.usage = engine_usage()


def run_round(llm: Any, pool: Sequence[Known], seed: str, seconds: float) -> Round:
    """One round; for a `Call` phase."""
    return Traffic(Driver(llm), pool, Random(seed)).run(seconds)


def end_engine(llm: Any) -> list[str]:
    """Shut the engine down inside its process; return what is left of kvbm. The last phase."""
    names = mapped_kvbm_names(["self"])
    llm.llm_engine.engine_core.shutdown()
    others = [f"in /dev/shm: {name}" for name in existing_names(names)]
    left = leaks.leaked(leaks.Snapshot(), leaks.Held())
    own = [line for line in left if "kvbm" in line and not line.startswith("name")]
    return others + own if names else ["the engine had nothing of kvbm mapped"]
