# SPDX-License-Identifier: Apache-2.0
"""What the demo runs: model, engine and conversations for a CPU and for a GPU.

Both are sized alike: the history of all conversations is several times the device cache, and
computing a late turn's prompt takes several times as long as bringing it back from the host.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from bench.vllm_lab.model import ModelShape, make_model
from bench.vllm_lab.settings import KVBM_TRANSFER_CONFIG, EngineSettings
from bench.vllm_lab.workload import Chat, Conversations, Phase, Replay, ResetPrefixCache

MEASURED = "conversations"  # name of the phase that is measured
WARM_UP_SEED = 1_000_003  # of tokens that the measured conversations do not have


@dataclass(frozen=True)
class Preset:
    """Sizes for one kind of device; lengths in tokens."""

    shape: ModelShape
    block_size: int
    device_blocks: int
    first_tokens: tuple[int, int]
    turn_tokens: tuple[int, int]
    output_tokens: int
    host_gb: float


PRESETS = {
    "cpu": Preset(
        shape=ModelShape(layers=8, hidden=512, heads=8, kv_heads=2, intermediate=1536),
        block_size=32,
        device_blocks=80,
        first_tokens=(280, 400),
        turn_tokens=(120, 200),
        output_tokens=24,
        host_gb=0.2,
    ),
    "cuda": Preset(
        shape=ModelShape(layers=16, hidden=1024, heads=16, kv_heads=8, intermediate=2816),
        block_size=16,
        device_blocks=2048,
        first_tokens=(6000, 8000),
        turn_tokens=(1000, 2000),
        output_tokens=32,
        host_gb=16.0,
    ),
}


@dataclass(frozen=True)
class Scenario:
    """Two engines that differ in the connector only, and what both are asked."""

    without: EngineSettings
    with_kvbm: EngineSettings
    conversations: Conversations
    phases: tuple[Phase, ...]
    host_gb: float


def make_scenario(
    device: str, conversations: int, turns: int, host_gb: float | None, seed: int, models: Path
) -> Scenario:
    """Build the scenario for a device ("cpu" or "cuda"); writes the model if it is not there.

    Raises
    ------
    ValueError
        If the conversations would fit in the device cache, so that nothing could be shown.
    """
    preset = PRESETS[device]
    plan = Conversations(
        count=conversations,
        turns=turns,
        first_tokens=preset.first_tokens,
        turn_tokens=preset.turn_tokens,
        output_tokens=preset.output_tokens,
        vocabulary=preset.shape.vocabulary,
        seed=seed,
    )
    longest = plan.longest_tokens()
    # Two requests at a time must fit, whatever --turns says.
    device_blocks = max(preset.device_blocks, 2 * (longest // preset.block_size + 2))
    device_tokens = (device_blocks - 1) * preset.block_size
    history = conversations * plan.shortest_history_tokens()
    if history <= device_tokens:
        raise ValueError(
            f"--conversations={conversations} --turns={turns}: before the last turn there are as "
            f"few as {history} tokens of history, which fit in the device cache of "
            f"{device_tokens} tokens; there would be nothing to bring back"
        )
    without = EngineSettings(
        model=make_model(models, preset.shape),
        device=device,
        block_size=preset.block_size,
        device_blocks=device_blocks,
        max_model_len=longest + 1,
        logprobs=False,
    )
    size_gb = preset.host_gb if host_gb is None else host_gb
    with_kvbm = replace(
        without,
        kv_transfer_config=KVBM_TRANSFER_CONFIG,
        environment={"DYN_KVBM_CPU_CACHE_GB": str(size_gb)},
    )
    return Scenario(without, with_kvbm, plan, _phases(plan), size_gb)


def _phases(plan: Conversations) -> tuple[Phase, ...]:
    """The measured conversations, after a warm-up that takes each path of either engine once.

    The first requests of an engine pay for allocations and lazy initialisation. The device's cache
    is emptied between the two halves of the warm-up, so that the second one loads with kvbm.
    """
    warm_up = replace(plan, count=2, turns=2, seed=WARM_UP_SEED)
    return (
        Chat("warm-up", warm_up),
        ResetPrefixCache("forget the device", connector=False),
        Replay("warm-up again", "warm-up"),
        ResetPrefixCache("forget all", connector=True),
        Chat(MEASURED, plan),
    )
