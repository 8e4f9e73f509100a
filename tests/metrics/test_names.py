# SPDX-License-Identifier: Apache-2.0
"""Names and labels of the metrics, and that every query of the dashboard asks for such ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm._fast.segment import COUNTER_NAMES
from kvbm.metrics.names import (
    COUNTERS,
    GAUGES,
    HISTOGRAM_LABELS,
    HISTOGRAMS,
    HIT_RATES,
    SHOWN,
    UPSTREAM,
    label_names,
    shown,
)

ROOT = Path(__file__).resolve().parent.parent.parent
DASHBOARD = ROOT / "docs" / "grafana.json"
UPSTREAM_NAMES = """
    kvbm_offload_blocks_d2h kvbm_offload_blocks_h2d kvbm_offload_blocks_d2d kvbm_offload_blocks_d2o
    kvbm_onboard_blocks_h2d kvbm_onboard_blocks_d2d kvbm_onboard_blocks_o2d kvbm_matched_tokens
    kvbm_object_read_failures kvbm_object_write_failures kvbm_host_cache_hit_rate
    kvbm_disk_cache_hit_rate kvbm_object_cache_hit_rate
"""


def labels_of_all() -> dict[str, tuple[str, ...]]:
    """Label names of each series that is exposed."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys((*UPSTREAM, *HIT_RATES), ())
    found |= {name: labels for name, (_, labels) in GAUGES.items()}
    for counter in SHOWN:
        metric = shown(counter).metric
        found[f"{metric}_total"] = label_names(metric)
    for name in HISTOGRAMS:
        found |= {f"{name}_{part}": HISTOGRAM_LABELS for part in ("count", "sum")}
        found[f"{name}_bucket"] = (*HISTOGRAM_LABELS, "le")
    return found


def test_all_of_upstreams_names_are_there() -> None:
    assert {*UPSTREAM, *HIT_RATES} == set(UPSTREAM_NAMES.split())


def test_metrics_of_one_name_have_the_same_labels() -> None:
    for counter in COUNTERS.values():
        wanted = ("instance", "engine", "leader", "rank", "tier", *counter.labels)
        assert label_names(counter.metric) == wanted
    with pytest.raises(KeyError):
        label_names("kvbm_nothing")


def test_a_counter_that_the_table_does_not_have_is_shown_under_its_own_name() -> None:
    assert shown("a_counter_of_tomorrow").metric == "kvbm_a_counter_of_tomorrow"


def test_no_two_metrics_share_a_name() -> None:
    ours = {shown(counter).metric for counter in SHOWN}
    assert not ours & {*UPSTREAM, *HIT_RATES, *GAUGES, *HISTOGRAMS}


def panels(node: Any) -> Iterator[tuple[str, str]]:
    """Title and expression of each query below a node."""
    for panel in node.get("panels", []):
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
        yield from panels(panel)


QUERIES = list(panels(json.loads(DASHBOARD.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_of_the_dashboard_asks_for_what_is_exposed(title: str, query: str) -> None:
    known = labels_of_all()
    asked = re.findall(r"\b(kvbm_\w+)(?:\{([^}]*)\})?", query)
    assert asked, title
    every = {"le"}
    for name, selector in asked:
        assert name in known, name
        every |= set(known[name])
        for label, _ in re.findall(r"(\w+)\s*(=~|!~|!=|=)", selector):
            assert label in known[name], f"{name} has no label {label}"
    for grouping in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", query):
        for label in filter(None, re.split(r"\s*,\s*", grouping.strip())):
            assert label in every, label
    assert query.count("(") == query.count(")")
    for name, _ in asked:
        if name.endswith(("_total", "_bucket", "_count", "_sum")):
            assert re.search(rf"(rate|increase)\({name}", query), f"{name} without a rate"


def test_the_dashboard_shows_everything_of_upstreams_dashboard_that_can_move() -> None:
    text = " ".join(query for _, query in QUERIES)
    moving = {name for name, (counter, _) in UPSTREAM.items() if counter is not None}
    assert {counter for counter, _ in UPSTREAM.values() if counter} <= {
        (tier, name) for tier in ("host", "disk") for name in COUNTER_NAMES
    }
    for name in moving | {"kvbm_host_cache_hit_rate", "kvbm_disk_cache_hit_rate"}:
        assert name in text


def test_each_title_and_place_of_the_dashboard_is_there_once() -> None:
    found = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["title"] for panel in found}) == len(found)
    assert len({panel["id"] for panel in found}) == len(found)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found}
    assert len(places) == len(found)
