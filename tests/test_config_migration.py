# SPDX-License-Identifier: Apache-2.0
"""The guide from Dynamo KVBM names what exists: variables, modules, classes, pages."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

import kvbm
from kvbm.config import tunables
from kvbm.config.kinds import Status

PACKAGE = Path(kvbm.__file__).parent
PAGE = PACKAGE.parent / "docs" / "migration.md"
TEXT = PAGE.read_text()
TRANSFER_CONFIGS = re.findall(r"--kv-transfer-config '(.*?)'", TEXT, re.DOTALL)


def connectors(config: object) -> list[dict[str, str]]:
    """A transfer configuration and its children."""
    assert isinstance(config, dict)
    children = config.get("kv_connector_extra_config", {}).get("connectors", [])
    return [config, *children]


def test_the_variables_exist() -> None:
    known = [t.variable for t in tunables()]
    for name in set(re.findall(r"DYN_KVBM_[A-Z_]+", TEXT)) - {"DYN_KVBM_"}:
        assert any(k == name or (name[-1] == "_" and k.startswith(name)) for k in known), name


def rows(pattern: str) -> list[tuple[str, str]]:
    """Names of the first column of the tables, with the first word of the answer to each."""
    cells = [line.split("|")[1:3] for line in TEXT.splitlines() if line.startswith("| ")]
    return [
        (name, re.split(r"[ ,:;.]", answer.strip())[0])
        for names, answer in cells
        for name in re.findall(pattern, names)
    ]


STATUS = {
    "Yes": Status.SUPPORTED,
    "New": Status.SUPPORTED,
    "Accepted": Status.UNNEEDED,
    "Not": Status.UNNEEDED,
    "No": Status.UNSUPPORTED,
}


@pytest.mark.parametrize(("name", "answer"), rows(r"DYN_KVBM_[A-Z_]+"))
def test_the_answer_for_a_variable_is_that_of_the_settings(name: str, answer: str) -> None:
    statuses = {
        t.status
        for t in tunables()
        if t.variable == name or (name[-1] == "_" and t.variable.startswith(name))
    }
    assert statuses == {STATUS[answer]}


@pytest.mark.parametrize(("name", "answer"), rows(r"`kvbm\.(\w+)`"))
def test_a_name_of_the_package_is_there_if_the_answer_is_yes(name: str, answer: str) -> None:
    is_there = hasattr(kvbm, name) or importlib.util.find_spec(f"kvbm.{name}") is not None
    assert is_there == (answer == "Yes")


@pytest.mark.parametrize("text", TRANSFER_CONFIGS)
def test_transfer_configurations_name_what_exists(text: str) -> None:
    source = (PACKAGE / "vllm_integration" / "connector" / "__init__.py").read_text()
    offered = next(
        ast.literal_eval(n.value)
        for n in ast.parse(source).body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    )
    ours = [c for c in connectors(json.loads(text)) if "kv_connector_module_path" in c]
    assert ours
    for config in ours:
        assert config["kv_connector_module_path"] == "kvbm.vllm_integration.connector"
        assert config["kv_connector"] in offered


def test_the_modules_that_are_run_exist() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert modules
    assert all(importlib.util.find_spec(name) for name in modules)


def test_the_pages_exist() -> None:
    pages = set(re.findall(r"\]\(([\w.-]+\.md)", TEXT))
    assert pages
    assert all((PAGE.parent / name).exists() for name in pages)
