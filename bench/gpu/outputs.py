# SPDX-License-Identifier: Apache-2.0
"""Real vLLM on a CUDA device: outputs from the host tier are those from the device's own cache.

``python -m bench.gpu.outputs``. A small Llama with real random weights, sharp enough that wrong KV
bytes change its tokens (bench/vllm_lab/model.py). One engine without a connector answers each
prompt twice, the second time from its prefix cache. One with kvbm has a device cache that the
prompts overflow, so that its second answers come from the host, computed in the same shapes: their
tokens and log probabilities must be equal. A third time, after part of the arena was overwritten,
they must not: else the comparison would show nothing.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.serving import ENVIRONMENT, TRANSFERS
from bench.vllm_lab.model import ModelShape, make_model

SHAPE = ModelShape(
    layers=8, hidden=1024, heads=8, kv_heads=4, head_dim=128, intermediate=1024, positions=8192
)
PROMPTS = 16
PROMPT_TOKENS = 2000
OUTPUT_TOKENS = 48
DEVICE_BLOCKS = 640
TIER_GB = "2"


def answers(engine: Any) -> list[dict[str, Any]]:
    """Ask all prompts, one after the other."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=1)
    generator, found = random.Random(1), []
    for _ in range(PROMPTS):
        count = PROMPT_TOKENS + generator.randrange(64)
        tokens = [generator.randrange(10, SHAPE.vocabulary) for _ in range(count)]
        output = engine.generate(TokensPrompt(prompt_token_ids=tokens), params, use_tqdm=False)[0]
        first = output.outputs[0]
        found.append(
            {
                "cached": output.num_cached_tokens,
                "tokens": list(first.token_ids),
                "logprobs": [
                    step[token].logprob
                    for step, token in zip(first.logprobs, first.token_ids, strict=True)
                ],
            }
        )
    return found


def scribble() -> int:
    """Overwrite a page in each megabyte of the arena's second half; returns the pages."""
    (path,) = glob.glob("/dev/shm/kvbm-*.host.0")
    size, pages = os.path.getsize(path), 0
    with open(path, "r+b") as arena:
        for at in range(1 << 20, size, 1 << 20):
            arena.seek(at)
            arena.write(os.urandom(4096))
            pages += 1
    return pages


def child(options: argparse.Namespace) -> None:
    """Run one engine and write what it answered."""
    from vllm import LLM

    transfer = TRANSFERS[options.mode]
    engine = LLM(
        model=options.model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        block_size=16,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.3,
        async_scheduling=True,
        num_gpu_blocks_override=None if transfer is None else DEVICE_BLOCKS,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        },
        **({} if transfer is None else {"kv_transfer_config": transfer}),
    )
    phases = {"cold": answers(engine), "again": answers(engine)}
    if transfer is not None:
        scribble()
        phases["scribbled"] = answers(engine)
    Path(options.result).write_text(json.dumps(phases))


def differing(a: list[dict[str, Any]], b: list[dict[str, Any]], what: str) -> int:
    """Answers that differ."""
    return sum(x[what] != y[what] for x, y in zip(a, b, strict=True))


def main() -> None:
    """Run both engines and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode")
    parser.add_argument("--model")
    parser.add_argument("--result")
    options = parser.parse_args()
    if options.mode:
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), SHAPE)
        phases = {}
        environment = os.environ | ENVIRONMENT | {"DYN_KVBM_CPU_CACHE_GB": TIER_GB}
        for mode in ("none", "kvbm"):
            result = Path(folder, f"{mode}.json")
            command = [sys.executable, "-m", "bench.gpu.outputs", "--mode", mode]
            command += ["--model", str(model), "--result", str(result)]
            subprocess.run(command, check=True, env=environment)
            phases[mode] = json.loads(result.read_text())
    ours, reference = phases["kvbm"], phases["none"]
    cached = [sum(a["cached"] for a in p) for p in (reference["again"], *ours.values())]
    print(f"cached tokens: device {cached[0]}, kvbm cold, again, scribbled {cached[1:]}")
    report = {
        "cold, other tokens": differing(reference["cold"], ours["cold"], "tokens"),
        "again, other tokens": differing(reference["again"], ours["again"], "tokens"),
        "again, other logprobs": differing(reference["again"], ours["again"], "logprobs"),
        "scribbled, other tokens": differing(reference["again"], ours["scribbled"], "tokens"),
    }
    print(json.dumps(report))
    good = not report["again, other tokens"] and report["scribbled, other tokens"]
    print("equal" if good and cached[2] > 0 else "NOT AS IT MUST BE")


if __name__ == "__main__":
    main()
