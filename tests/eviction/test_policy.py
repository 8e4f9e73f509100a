# SPDX-License-Identifier: Apache-2.0
"""How a table gets its policy: by name, one of somebody's own, and what is wrong with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kvbm._fast.keys import Keys
from kvbm.config import Settings
from kvbm.errors import ConfigError
from kvbm.eviction.policy import POLICIES, VARIABLE, evict_by, policy_of
from kvbm.eviction.reuse import Reuse
from tests.fast.instances import digests, instance, matched

ROOT = Path(__file__).parents[2]
OWN = """
class Third:
    def __init__(self, uses):
        self.uses = uses

    def arrive(self, use, keys, stop, hits):
        return use % 3

class Broken(Third):
    def __init__(self, uses):
        raise OSError("no table today")

class NoPolicy:
    pass
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_policies.py").write_text(OWN)
    (tmp_path / "bad_policies.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_policies", "bad_policies"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_default_is_upstreams_order() -> None:
    assert policy_of(Settings().eviction_policy) is None
    assert policy_of("reuse") is Reuse


def test_each_policy_that_comes_with_kvbm_is_a_value_of_the_setting() -> None:
    for name in POLICIES:
        assert Settings.model_validate({"eviction_policy": name}).eviction_policy == name


def test_one_of_somebodys_own_is_asked() -> None:
    made = instance(8)
    try:
        table = made.leader()
        evict_by(table, policy_of("own_policies:Third"))
        assert table.uses is not None
        keys = Keys(digests(3))
        assert matched(table, keys) == 0
        assert (keys.use, table.uses.last) == (1, 1)
        evict_by(table, None)
        assert table.uses is None
    finally:
        made.remove()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("arc", "LookupError: not a policy of kvbm"),
        ("no_such_module:Policy", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("bad_policies:Policy", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("own_policies:Fourth", "AttributeError: module 'own_policies' has no attribute 'Fourth'"),
        ("own_policies:NoPolicy", "TypeError: NoPolicy has no method arrive"),
    ],
)
def test_what_is_no_policy_is_refused_with_setting_value_and_what_is_allowed(
    name: str, why: str
) -> None:
    says = (
        f"{VARIABLE}={name!r} is not valid "
        f"(allowed: lru, reuse, or package.module:Class of your own): {why}"
    )
    with pytest.raises(ConfigError, match=re.escape(says)):
        policy_of(name)


def test_one_that_cannot_be_made_leaves_upstreams_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = instance(8)
    try:
        table = made.leader()
        evict_by(table, policy_of("own_policies:Broken"))
        assert table.uses is None
        assert "the eviction policy Broken could not be made" in caplog.text
        assert "no table today" in caplog.text
    finally:
        made.remove()


def test_the_example_of_the_documentation_works() -> None:
    page = (ROOT / "docs" / "eviction.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    made = instance(4)
    try:
        table = made.leader()
        evict_by(table, names["ShortPromptsFirst"])
        assert matched(table, Keys(digests(3))) == 0
        assert table.uses is not None
    finally:
        made.remove()
