# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.soak``: exit status 0 if nothing was found, 1 if something was.

Half of the time goes to an engine with asynchronous scheduling, half to one without.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.vllm_lab.engine import Message, stop_server, vllm_build
from bench.vllm_lab.model import ModelShape, make_model
from bench.vllm_lab.results import PhaseResult
from bench.vllm_lab.workload import Conversations
from tests.soak.report import EngineSoak, missing, problems, table
from tests.soak.run import SCHEDULES, Soak, make_pool, run_soak
from tests.soak.traffic import Round

ROUND_S = 30.0
HOST_BLOCKS = 200
POOL = Conversations(count=24, turns=4, together=8)  # about 600 blocks

HEAD = """\
# Soak

Real vLLM with kvbm under random traffic: multi-turn prompts with shared prefixes, aborts in every
state, preemptions, resets, copies held back, faults. The greedy output of every finished request is
compared with that of an engine without kvbm. What it holds is looked at between rounds of
{round_s:.0f} s, when nothing runs: medians of the second third of the rounds and of the last one.

`{command}` at {commit}, {build}, device cache 64 blocks, host tier {blocks} blocks of 32 tokens,
a pool of {prompts} prompts of up to {longest} tokens.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    parser.add_argument("--logs", type=Path, help="folder for the engines' logs, which is kept")
    parser.add_argument("--write", type=Path, help="Markdown file for the result")
    return parser


def _show(message: Message) -> None:
    match message:
        case ("phase", PhaseResult(name=name, value=Round() as value)):
            counts, usage = value.counts, value.usage
            assert usage is not None
            print(
                f"{name}: {counts['requests']} requests, {counts['wrong outputs']} wrong, "
                f"{usage.rss_bytes >> 20} MiB, {usage.descriptors} descriptors, "
                f"{usage.threads} threads",
                flush=True,
            )


def _commit() -> str:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(git, capture_output=True, text=True)
    return found.stdout.strip() or "an unknown commit"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; return the exit status."""
    options = _parser().parse_args(arguments)
    build = vllm_build()
    if build is None:
        print("vLLM is not installed: use `make soak`")
        return 2
    rounds = max(3, round(options.minutes * 60 / len(SCHEDULES) / ROUND_S))
    commit = _commit()
    soaks: list[EngineSoak] = []
    with tempfile.TemporaryDirectory(prefix="kvbm-soak-") as scratch:
        folder = Path(scratch)
        logs = options.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        model = make_model(folder, ModelShape())
        first = Soak(options.seed, rounds, ROUND_S, HOST_BLOCKS)
        pool = make_pool(model, first, POOL, logs / "reference.log")
        print(f"{build}, {len(pool)} prompts, {rounds} rounds of {ROUND_S:.0f} s an engine")
        for schedule in SCHEDULES:
            print(f"{schedule}:", flush=True)
            soak = Soak(options.seed, rounds, ROUND_S, HOST_BLOCKS, schedule)
            log = logs / f"{schedule.replace(' ', '-')}.log"
            soaks.append(run_soak(model, soak, pool, log, _show))
    stop_server()
    found = [line for soak in soaks for line in problems(soak)]
    found += [f"{soak.name}: never happened: {what}" for soak in soaks for what in missing(soak)]
    print(table(soaks))
    print("\n".join(found) or "nothing found")
    if options.write is not None:
        head = HEAD.format(
            command=f"python -m tests.soak --minutes {options.minutes:g} --seed {options.seed}",
            commit=commit,
            build=build,
            blocks=HOST_BLOCKS,
            prompts=len(pool),
            longest=max(len(known.prompt) for known in pool),
            round_s=ROUND_S,
        )
        result = "\n".join(f"- {line}" for line in found) or "Nothing was found."
        options.write.write_text(f"{head}\n{table(soaks)}\n\n{result}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
