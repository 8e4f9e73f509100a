# SPDX-License-Identifier: Apache-2.0
"""Real vLLM on a CUDA device: first tokens from the host tier, and what the connector costs.

``python -m bench.gpu.serving --model DIR [--modes none,kvbm,native] [--lengths 2048,16384]``. Each
mode is a process of its own; they import vLLM at once and take the device in turn. The model may
have dummy weights (a directory with a config.json alone).

cold, gpu, host
    Milliseconds to the first token of one prompt: never seen; again; again after the device's
    prefix cache has been dropped. Medians, with the least and the greatest.
six at once
    Seconds for six 8k-token prompts that come from the host together.
decode mix
    While 16 requests decode, three 8k-token prompts from the host arrive: the longest step until
    all three have their first token. Three times.
throughput
    Output tokens a second of 32 prompts of 1,024 tokens that hit nothing, 64 tokens each.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.vllm_lab.settings import CUDA_ENVIRONMENT, CUDA_GRAPHS, KVBM_TRANSFER_CONFIG

BLOCK_TOKENS = 16
TIER_BYTES = 16 * 10**9
ENVIRONMENT = CUDA_ENVIRONMENT | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "DYN_KVBM_CPU_CACHE_GB": str(TIER_BYTES / 10**9),
}
TRANSFERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "kvbm": KVBM_TRANSFER_CONFIG,
    "native": {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": TIER_BYTES},
    },
}


def make_engine(model: str, mode: str, max_tokens: int) -> Any:
    """Start an engine with full CUDA graphs for small batches."""
    from vllm import LLM

    transfer = TRANSFERS[mode]
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=max_tokens,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.85,
        block_size=BLOCK_TOKENS,
        enable_prefix_caching=True,
        disable_log_stats=True,
        **CUDA_GRAPHS,
        **({} if transfer is None else {"kv_transfer_config": transfer}),
    )


class Traffic:
    """Prompts of random tokens, and the time that an engine takes for them."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._random = random.Random(0)
        self._number = 0

    def prompt(self, blocks: int) -> Any:
        """Return a new prompt of so many full blocks and one token."""
        from vllm.inputs import TokensPrompt

        count = blocks * BLOCK_TOKENS + 1
        tokens = [self._random.randrange(10, 100_000) for _ in range(count)]
        return TokensPrompt(prompt_token_ids=tokens)

    def run(self, prompts: Any, tokens: int = 1) -> tuple[float, list[list[int]]]:
        """Generate greedily; returns seconds and the tokens."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return seconds, [list(o.outputs[0].token_ids) for o in outputs]

    def drop_device_cache(self) -> None:
        """Forget the device's prefix cache, as soon as copies no longer hold its blocks."""
        for _ in range(400):
            self.run([self.prompt(1)], 2)
            if self.engine.reset_prefix_cache():
                return
        raise RuntimeError("the prefix cache could not be reset")


def first_tokens(traffic: Traffic, length: int, rounds: int) -> dict[str, Any]:
    """Times to the first token of one prompt: cold, from the device, from the host."""
    times: dict[str, list[float]] = {"cold": [], "gpu": [], "host": []}
    same = True
    for number in range(rounds + 1):
        prompt = traffic.prompt(length // BLOCK_TOKENS)
        cold, first = traffic.run([prompt])
        gpu, second = traffic.run([prompt])
        traffic.drop_device_cache()
        host, third = traffic.run([prompt])
        traffic.drop_device_cache()
        same = same and first == second == third
        if number:
            for kind, seconds in (("cold", cold), ("gpu", gpu), ("host", host)):
                times[kind].append(seconds * 1e3)
    result: dict[str, Any] = {
        kind: [round(f(ms), 1) for f in (statistics.median, min, max)] for kind, ms in times.items()
    }
    result["same token"] = same
    return result


def six_at_once(traffic: Traffic) -> list[float]:
    """Seconds for six 8k-token prompts from the host, twice."""
    prompts = [traffic.prompt(512) for _ in range(6)]
    traffic.run(prompts)
    seconds = []
    for _ in range(3):
        traffic.drop_device_cache()
        seconds.append(round(traffic.run(prompts)[0], 4))
    return seconds


def decode_mix(traffic: Traffic) -> dict[str, float]:
    """Step times while three prompts come from the host beside 16 decoding requests."""
    from vllm import SamplingParams

    arriving = [traffic.prompt(512) for _ in range(3)]
    traffic.run(arriving)
    traffic.drop_device_cache()
    engine = traffic.engine.llm_engine
    for i in range(16):
        params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
        engine.add_request(f"decode-{i}", traffic.prompt(8), params)
    for _ in range(30):
        engine.step()
    base, longest, begin = [], 0.0, time.perf_counter()
    for _ in range(40):
        started = time.perf_counter()
        engine.step()
        base.append(time.perf_counter() - started)
    for i, prompt in enumerate(arriving):
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        engine.add_request(f"host-{i}", prompt, params)
    begin, waiting = time.perf_counter(), {"host-0", "host-1", "host-2"}
    all_there = 0.0
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        took = time.perf_counter() - started
        if waiting:
            longest = max(longest, took)
            waiting -= {o.request_id for o in outputs if o.outputs[0].token_ids}
            all_there = time.perf_counter() - begin
    return {
        "base step ms": round(statistics.median(base) * 1e3, 2),
        "longest step ms": round(longest * 1e3, 1),
        "three first tokens ms": round(all_there * 1e3, 1),
        "all done s": round(time.perf_counter() - begin, 2),
    }


def throughput(traffic: Traffic, rounds: int = 3) -> list[float]:
    """Output tokens a second where nothing is found, of each round."""
    rates = []
    for _ in range(rounds + 1):
        prompts = [traffic.prompt(64) for _ in range(32)]
        seconds, outputs = traffic.run(prompts, 64)
        rates.append(round(sum(map(len, outputs)) / seconds, 1))
    return rates[1:]


def child(options: argparse.Namespace) -> None:
    """Run one mode and print its results as JSON."""
    import vllm

    with open(options.turn, "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # the device is one mode's at a time
        began = time.perf_counter()
        engine = make_engine(options.model, options.mode, max(*options.lengths, 8192) + 512)
        results: dict[str, Any] = {
            "mode": options.mode,
            "vllm": vllm.__version__,
            "start s": round(time.perf_counter() - began, 1),
        }
        traffic = Traffic(engine)
        time.sleep(options.settle)
        traffic.run([traffic.prompt(max(options.lengths) // BLOCK_TOKENS)])
        traffic.drop_device_cache()
        for length in options.lengths:
            results[f"{length}"] = first_tokens(traffic, length, options.rounds)
            print(json.dumps(results), flush=True)
        results["six at once s"] = six_at_once(traffic)
        print(json.dumps(results), flush=True)
        results["throughput"] = throughput(traffic)
        print(json.dumps(results), flush=True)
        results["decode mix"] = [decode_mix(traffic) for _ in range(3)]
        print("RESULT " + json.dumps(results), flush=True)


def main() -> None:
    """Start all modes and print what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--modes", default="none,kvbm,native")
    parser.add_argument("--lengths", default="2048,8192,16384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=float, default=10.0)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mode")
    parser.add_argument("--turn")
    options = parser.parse_args()
    options.lengths = [int(n) for n in options.lengths.split(",")]
    if options.mode:
        child(options)
        return
    turn = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115
    running = []
    for mode in options.modes.split(","):
        log = (options.logs / f"serving-{mode}.log").open("w")
        command = [sys.executable, "-m", "bench.gpu.serving", *sys.argv[1:]]
        command += ["--mode", mode, "--turn", turn.name]
        running.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
        )
    for mode, process in zip(options.modes.split(","), running, strict=True):
        process.wait()
        lines = (options.logs / f"serving-{mode}.log").read_text().splitlines()
        found = [line for line in lines if line.startswith(("RESULT ", "{"))]
        print(found[-1] if found else f"{mode} failed:\n" + "\n".join(lines[-40:]), flush=True)


if __name__ == "__main__":
    main()
