# SPDX-License-Identifier: Apache-2.0
"""Upstream's small helpers answer as upstream's do."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.utils import get_consolidator_mode, is_dyn_runtime_enabled, is_truthy, nvtx_annotate

MODE = "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE"


@pytest.mark.parametrize(
    ("text", "yes"),
    [(text, True) for text in ("1", "true", "on", "yes", "TRUE", "On")]
    + [(text, False) for text in ("", "0", "false", "2", "y", "enabled")],
)
def test_four_words_mean_yes(text: str, yes: bool) -> None:
    assert is_truthy(text) is yes


@pytest.mark.parametrize(
    ("value", "mode"),
    [(None, "dedup"), ("", "dedup"), ("dedup", "dedup"), ("PassThrough", "passthrough")],
)
def test_the_consolidator_mode_is_that_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, value: str | None, mode: str
) -> None:
    monkeypatch.delenv(MODE, raising=False)
    if value is not None:
        monkeypatch.setenv(MODE, value)
    assert get_consolidator_mode() == mode


def test_an_unknown_consolidator_mode_is_dedup_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MODE, "merge")
    with caplog.at_level(logging.WARNING, "kvbm"):
        assert get_consolidator_mode() == "dedup"
    assert f"{MODE}='merge'" in caplog.text
    assert "dedup, passthrough" in caplog.text


@pytest.mark.parametrize(
    ("value", "enabled"), [(None, False), ("1", True), ("True", True), ("yes", False), ("0", False)]
)
def test_the_runtime_is_enabled_by_1_or_true(
    monkeypatch: pytest.MonkeyPatch, value: str | None, enabled: bool
) -> None:
    monkeypatch.delenv("DYN_RUNTIME_ENABLED_KVBM", raising=False)
    if value is not None:
        monkeypatch.setenv("DYN_RUNTIME_ENABLED_KVBM", value)
    assert is_dyn_runtime_enabled() is enabled


def test_without_nvtx_a_function_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)

    def work() -> int:
        return 7

    assert nvtx_annotate(work) is work
    assert nvtx_annotate(domain="other", category="x")(work) is work


def test_with_nvtx_a_call_is_a_green_range_with_the_functions_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []

    def annotate(**options: Any) -> Any:
        made.append(options)
        return lambda function: lambda *arguments: ("annotated", function(*arguments))

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))

    @nvtx_annotate
    def one(x: int) -> int:
        return x

    @nvtx_annotate(domain="other", category="copy")
    def two(x: int) -> int:
        return x

    assert (one(1), two(2)) == (("annotated", 1), ("annotated", 2))
    assert [options["message"].rpartition(".")[2] for options in made] == ["one", "two"]
    assert [options["domain"] for options in made] == ["kvbm", "other"]
    assert [options["category"] for options in made] == [None, "copy"]
    assert {options["color"] for options in made} == {"green"}
