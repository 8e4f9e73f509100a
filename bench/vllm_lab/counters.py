# SPDX-License-Identifier: Apache-2.0
"""Counters, read in the process of the engine's front end."""

from typing import Any


def read_engine_counters(llm: Any) -> dict[str, float]:
    """vLLM's own counters.

    Returns
    -------
    dict
        By name without the ``vllm:`` prefix; a counter with a ``source`` label gives one entry a
        source, ``<name>/<source>``. Values are summed over the other labels.
    """
    counters: dict[str, float] = {}
    for metric in llm.get_metrics():
        if type(metric).__name__ != "Counter":
            continue
        name = metric.name.removeprefix("vllm:")
        if "source" in metric.labels:
            name = f"{name}/{metric.labels['source']}"
        counters[name] = counters.get(name, 0.0) + metric.value
    return counters


def read_kvbm_counters() -> dict[str, float]:
    """Kvbm's counters as the engine publishes them: samples ``kvbm_*`` of the Prometheus registry.

    Returns
    -------
    dict
        By sample name without ``_total``, summed over labels; empty without a connector.
    """
    from prometheus_client import REGISTRY

    counters: dict[str, float] = {}
    for metric in REGISTRY.collect():
        if not metric.name.startswith("kvbm_"):
            continue
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                name = sample.name.removesuffix("_total")
                counters[name] = counters.get(name, 0.0) + sample.value
    return counters


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """How far each counter moved."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}
