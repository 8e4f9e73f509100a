# SPDX-License-Identifier: Apache-2.0
"""What the worker side tells the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing vLLM takes many seconds


def test_a_failure_in_the_middle_of_a_report_loses_no_request(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, loads = [{"stored"}, {"later"}, set()], [RuntimeError, {"loaded": [7]}, {}]

    def ended_loads() -> dict[str, list[int]]:
        answer = loads.pop(0)
        if answer is RuntimeError:
            raise RuntimeError
        return answer  # type: ignore[return-value]

    worker = connect().worker
    broken = SimpleNamespace(ended_stores=lambda: stores.pop(0), ended_loads=ended_loads)
    monkeypatch.setattr(worker._worker, "_worker", broken)
    assert worker.get_finished(set()) == (None, None)  # the hook's error is counted, not raised
    assert worker.get_finished(set()) == ({"stored", "later"}, {"loaded"})
    assert worker.get_block_ids_with_load_errors() == {7}
    assert worker.get_finished(set()) == (None, None)
    monkeypatch.undo()
