# SPDX-License-Identifier: Apache-2.0
"""KV of another salt, adapter or input is never found; what cannot be told apart is not cached."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trtllm_integration.engine import BLOCK, Engine, Request

Serve = Callable[..., Engine]
PROMPT = list(range(3, 3 + 4 * BLOCK + 5))  # four blocks and a bit
WHOLE = 4 * BLOCK


@pytest.mark.parametrize(
    "identity",
    [{"cache_salt": "a"}, {"cache_salt_id": 7}, {"lora_task_id": 1}, {"lora_task_id": 0}],
    ids=str,
)
def test_salts_and_adapters_are_kept_apart(serve: Serve, identity: dict[str, Any]) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    engine.serve(Request(2, list(PROMPT), **identity))
    engine.serve(Request(3, list(PROMPT), **identity))
    other = {
        name: f"{value}0" if isinstance(value, str) else value + 1
        for name, value in identity.items()
    }
    engine.serve(Request(4, list(PROMPT), **other))
    assert [engine.loaded[number] for number in (2, 3, 4)] == [0, WHOLE, 0]


def test_inputs_that_only_the_admission_shows_are_not_stored(serve: Serve) -> None:
    engine = serve()
    for number in (1, 2):
        engine.serve(Request(number, list(PROMPT), py_multimodal_data={"image": 1}))
        assert engine.loaded[number] == 0
    assert engine.counter("published") == 0


def test_an_adapter_is_another_one_in_another_engine(interface: Any) -> None:
    from kvbm.trtllm_integration.request_keys import request_keys

    request = Request(1, [1], lora_task_id=3)
    assert request_keys(request, "one") != request_keys(request, "two")
    request = Request(1, [1])
    assert request_keys(request, "one") == request_keys(request, "two")


@pytest.mark.parametrize(
    "more",
    [
        {"multimodal_hashes": [[1] * 8]},
        {"multimodal_positions": [4]},
        {"multimodal_embedding": SimpleNamespace()},
        {"prompt_embedding_table": SimpleNamespace()},
        {"return_context_logits": True},
        {"is_dummy_request": True},
    ],
    ids=str,
)
def test_what_is_more_than_tokens_runs_without_the_cache(
    serve: Serve, more: dict[str, Any]
) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    for number in (2, 3):
        engine.serve(Request(number, list(PROMPT), **more))
        assert engine.loaded[number] == 0
    assert engine.counter("errors") == 0
    assert engine.counter("published") == 4  # of the first one
    assert engine.side._known == {}


@pytest.mark.parametrize("name", ["lora_task_id", "multimodal_hashes", "cache_salt"])
def test_a_request_that_does_not_tell_its_identity_is_not_cached(serve: Serve, name: str) -> None:
    engine = serve()
    engine.serve(Request(1, list(PROMPT)))
    request = SimpleNamespace(
        request_id=2, get_tokens=lambda _: list(PROMPT), is_dummy_request=False
    )
    whole = Request(2, list(PROMPT))
    for field in vars(whole):
        if field != name and not (name == "cache_salt" and field == "cache_salt_id"):
            setattr(request, field, getattr(whole, field))
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert engine.counter("errors") == 1


def test_a_salts_number_is_taken_where_there_is_no_text(interface: Any) -> None:
    from kvbm.trtllm_integration.compat import salt_of

    assert salt_of(SimpleNamespace(cache_salt="a", cache_salt_id=1)) == "a"
    assert salt_of(SimpleNamespace(cache_salt=None, cache_salt_id=1)) == "id 1"
    assert salt_of(SimpleNamespace(cache_salt_id=0)) == "id 0"
    assert salt_of(SimpleNamespace(cache_salt_id=None)) is None
    assert salt_of(SimpleNamespace(cache_salt=None)) is None
