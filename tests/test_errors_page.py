# SPDX-License-Identifier: Apache-2.0
"""The messages that docs/configuration.md lists are those that the sources have."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import kvbm

SOURCES = Path(kvbm.__file__).parent
PAGE = SOURCES.parent / "docs" / "configuration.md"
TITLE = "## What kvbm says when something is wrong"
GAP = "…"


def rows() -> list[str]:
    """Second column of the table."""
    section = PAGE.read_text(encoding="utf-8").partition(TITLE)[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[1] for line in lines[1:]]


@functools.cache
def texts() -> str:
    """All texts of the sources, with gaps where something is put in."""
    found: list[str] = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub("%[sd]", GAP, node.value))
    return "\n".join(found)


@pytest.mark.parametrize("row", rows())
def test_every_message_of_the_table_is_one_of_the_sources(row: str) -> None:
    messages = re.findall("`([^`]+)`", row)
    assert messages
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split(GAP))):
            assert part in texts(), part


def test_the_table_has_all_kinds_of_problems() -> None:
    text = "\n".join(rows())
    assert len(rows()) >= 20
    for word in ("DYN_KVBM_CPU_CACHE_GB", "DYN_KVBM_DISK_CACHE_DIR", "INIT_TIMEOUT_SECS"):
        assert word in text
