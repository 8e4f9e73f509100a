# SPDX-License-Identifier: Apache-2.0
"""What happens in the engine's process: start vLLM, run the phases, report, end.

Messages to the parent, in order:
("ready", seconds)                     the engine takes requests
("request", phase, finished, total)    after each group of requests
("phase", PhaseResult)                 after each phase
("finished", names)                    all phases done; kvbm's /dev/shm names in use until now
("failed", traceback)                  instead of any of them; the last message
"""

import atexit
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.vllm_lab.counters import difference, read_engine_counters, read_kvbm_counters
from bench.vllm_lab.processes import group_members, mapped_kvbm_names
from bench.vllm_lab.results import PhaseResult, RequestResult
from bench.vllm_lab.settings import EngineSettings
from bench.vllm_lab.workload import (
    Call,
    Chat,
    Phase,
    Prompt,
    Replay,
    ResetPrefixCache,
    Send,
    reusable_tokens,
)


def main(
    settings: EngineSettings, phases: Sequence[Phase], connection: Connection, log: Path
) -> None:
    """Run the phases in a fresh engine; the target of the process that the parent starts."""
    os.setsid()  # a group of its own, so that the parent can find and end all of its processes
    redirect_output(log)
    settings.apply_environment()
    try:
        began = time.perf_counter()
        runner = PhaseRunner(settings, connection)
        connection.send(("ready", time.perf_counter() - began))
        for phase in phases:
            connection.send(("phase", runner.run(phase)))
        connection.send(("finished", mapped_kvbm_names(group_members(os.getpid()))))
        runner.close()
    except BaseException:  # noqa: BLE001  # whatever ends the engine, the parent is told
        connection.send(("failed", traceback.format_exc()))
        sys.exit(1)
    finally:
        # Processes made by multiprocessing skip these up to Python 3.12, a user's script does not.
        atexit._run_exitfuncs()


def redirect_output(log: Path) -> None:
    """Send what this process writes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


class PhaseRunner:
    """An engine and what it has been asked so far."""

    def __init__(self, settings: EngineSettings, connection: Connection) -> None:
        from vllm import LLM

        self._settings = settings
        self._connection = connection
        self._llm: Any = LLM(**settings.llm_arguments())
        self._done: dict[str, PhaseResult] = {}
        # Tokens with KV of each request since the last reset, and what it was asked for.
        self._computed: list[list[int]] = []

    def close(self) -> None:
        """Let go of the engine as a script does that comes to its end."""
        del self._llm
        gc.collect()

    def run(self, phase: Phase) -> PhaseResult:
        """Run one phase and return what it did."""
        engine_before, kvbm_before = read_engine_counters(self._llm), read_kvbm_counters()
        began = time.perf_counter()
        requests: list[RequestResult] = []
        value = None
        match phase:
            case ResetPrefixCache():
                value = self._llm.reset_prefix_cache(reset_connector=phase.connector)
                if phase.connector:
                    self._computed.clear()
            case Call():
                value = phase.function(self._llm, *phase.arguments)
            case _:
                for request in self._traffic(phase):
                    requests.append(request)
        result = PhaseResult(
            name=phase.name,
            requests=tuple(requests),
            wall_s=time.perf_counter() - began,
            engine_counters=difference(read_engine_counters(self._llm), engine_before),
            kvbm_counters=difference(read_kvbm_counters(), kvbm_before),
            value=value,
        )
        self._done[phase.name] = result
        return result

    def _traffic(self, phase: Chat | Replay | Send) -> Iterator[RequestResult]:
        match phase:
            case Chat():
                yield from self._chat(phase)
            case Replay():
                source = self._done[phase.source].requests
                turns = phase.turns or sorted({request.turn for request in source})
                prompts = [r.as_prompt() for turn in turns for r in source if r.turn == turn]
                if phase.latest_first:
                    prompts.reverse()
                output_tokens = len(source[0].output)
                yield from self._send(phase.name, prompts, output_tokens, phase.together)
            case Send():
                yield from self._send(
                    phase.name, phase.prompts, phase.output_tokens, phase.together
                )

    def _chat(self, phase: Chat) -> Iterator[RequestResult]:
        plan = phase.conversations
        history: list[list[int]] = [[] for _ in range(plan.count)]
        finished = 0
        for turn in range(plan.turns):
            for first in range(0, plan.count, plan.together):
                group = range(first, min(first + plan.together, plan.count))
                prompts = []
                for conversation in group:
                    history[conversation] += plan.user_tokens(conversation, turn)
                    prompts.append(Prompt(conversation, turn, tuple(history[conversation])))
                for request in self._generate(prompts, plan.output_tokens):
                    history[request.conversation] += request.output
                    yield request
                finished += len(prompts)
                self._connection.send(("request", phase.name, finished, plan.request_count()))

    def _send(
        self, name: str, prompts: Sequence[Prompt], output_tokens: int, together: int
    ) -> Iterator[RequestResult]:
        for first in range(0, len(prompts), together):
            group = prompts[first : first + together]
            yield from self._generate(group, output_tokens)
            self._connection.send(("request", name, first + len(group), len(prompts)))

    def _generate(self, prompts: Sequence[Prompt], output_tokens: int) -> list[RequestResult]:
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=2 if self._settings.logprobs else None,
        )
        inputs = [TokensPrompt(prompt_token_ids=list(prompt.tokens)) for prompt in prompts]
        outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
        results = [self._result(*pair) for pair in zip(prompts, outputs, strict=True)]
        self._computed += [[*result.prompt, *result.output[:-1]] for result in results]
        return results

    def _result(self, prompt: Prompt, output: Any) -> RequestResult:
        completion = output.outputs[0]
        block = self._settings.block_size
        ranked = [
            sorted((entry.logprob for entry in position.values()), reverse=True)
            for position in completion.logprobs or ()
        ]
        chosen = [
            position[token].logprob
            for position, token in zip(
                completion.logprobs or (), completion.token_ids, strict=False
            )
        ]
        return RequestResult(
            conversation=prompt.conversation,
            turn=prompt.turn,
            prompt=prompt.tokens,
            output=tuple(completion.token_ids),
            logprobs=tuple(chosen),
            margin=min((best[0] - best[1] for best in ranked), default=math.inf),
            cached_tokens=output.num_cached_tokens or 0,
            reusable_tokens=reusable_tokens(self._computed, prompt.tokens, block),
            ttft_s=output.metrics.first_token_latency,
            finish_reason=str(completion.finish_reason),
        )
