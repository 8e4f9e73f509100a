# SPDX-License-Identifier: Apache-2.0
"""Golden output of the commands that are about more than one frozen snapshot, or draw one.

The others are in `tests.inspect.test_cli`; KVBM_UPDATE_GOLDEN=1 writes the files anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from kvbm._fast.segment import FORMAT_VERSION
from kvbm.inspect import cli
from kvbm.inspect.capture import capture
from kvbm.instance import instances
from tests.fast.instances import digests, instance
from tests.inspect.conftest import Inspect
from tests.inspect.samples import Sample, chain, fill, frozen_snapshot
from tests.inspect.test_cli import GOLDEN, check_golden
from tests.inspect.test_serve import ask, served

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


@pytest.fixture
def later_file(snapshot_file: Path) -> Iterator[str]:
    """A snapshot of the sample with two blocks more, beside the frozen one."""
    folder = Path("later")
    folder.mkdir()
    one = instance(host_slots=64, ranks=2)
    try:
        sample = fill(one)
        chain(sample.table, digests(2, "later"))
        yield str(frozen_snapshot(sample, folder))
    finally:
        one.remove()


@pytest.fixture
def listed(snapshot_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen snapshot is the one instance of this host, beside one without a segment."""
    found = {"no-segment": ["/kvbm-no-segment.host.0"], "sample": ["/kvbm-sample"]}
    files = {"sample": str(snapshot_file)}
    monkeypatch.setattr(cli, "instances", lambda: found)
    monkeypatch.setattr(cli, "capture", lambda name: capture(files.get(name, name)))


def check_json(name: str, found: str) -> None:
    """Compare a JSON document, without what other changes of the core move."""
    document = json.loads(found)
    assert document["schema"] == 1
    check_golden(f"{name}.json", json.dumps(document, indent=1) + "\n")


@pytest.mark.usefixtures("listed")
def test_list(inspect: Inspect) -> None:
    check_golden("list.txt", inspect("list").stdout)
    check_json("list", inspect("list", "--json").stdout)


def test_block(snapshot_file: Path, inspect: Inspect) -> None:
    check_json("block", inspect("block", "block:3", snapshot_file, "--json").stdout)


def test_diff(snapshot_file: Path, later_file: str, inspect: Inspect) -> None:
    check_golden("diff.txt", inspect("diff", snapshot_file, later_file).stdout)
    check_json("diff", inspect("diff", snapshot_file, later_file, "--json").stdout)


@pytest.mark.parametrize("what", ["tiers", "tree"])
def test_map(what: str, snapshot_file: Path, inspect: Inspect) -> None:
    assert inspect("map", "map.svg", snapshot_file, "--what", what).exit_code == 0
    check_golden(f"map-{what}.svg", Path("map.svg").read_text(encoding="utf-8"))


def check_picture(sample: Sample, found: str) -> None:
    """Compare one picture of the live sample, without what differs between two runs."""
    text = json.dumps(json.loads(found), indent=1).replace(sample.name, "NAME")
    text = re.sub(r'"(age_seconds|pid)": [\d.e-]+', r'"\1": 1', text)
    text = text.replace(f": {os.getpid()},", ": 1,")
    check_golden("top.json", text + "\n")


def test_top(sample: Sample, inspect: Inspect) -> None:
    check_picture(sample, inspect("top", sample.name, "--json", "--seconds", 0).stdout)


def test_serve(sample: Sample) -> None:
    with served(lambda: [sample.name]) as server:
        check_picture(sample, ask(server, f"/frame.json?instance={sample.name}")[2].decode())
        for name in ("instances.json", "frame.json", "elsewhere"):
            body = json.loads(ask(server, f"/{name}")[2])
            text = json.dumps(body, indent=1).replace(sample.name, "NAME")
            check_golden(f"serve-{name.removesuffix('.json')}.json", text + "\n")
        page = ask(server, "/")[2].decode()
    # What it has before its script runs; how it looks is for the style, and for a browser.
    static = re.sub(r"(<(style|script)>).*?(</\2>)", r"\1...\3", page, flags=re.DOTALL)
    check_golden("serve.html", static)


FREE_FORM = {"counters", "per_second", "description"}  # names of other things, not fields
BY_NAME = {"pools", "blocks", "operations", "placements"}  # by tier or state, if no list


def fields_in(value: object) -> Iterator[str]:
    """Names of all fields of a document."""
    if isinstance(value, list):
        for one in value:
            yield from fields_in(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            if name in FREE_FORM:
                continue
            by_name = name in BY_NAME and isinstance(one, dict)
            for inner in list(one.values()) if by_name else [one]:
                yield from fields_in(inner)


def documented_fields() -> dict[str, set[str]]:
    """Words in the row of each command of docs/inspect.md, with those of rows that it names."""
    text = (DOCS / "inspect.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", text[text.index("\n## JSON") :], re.MULTILINE)
    found = {
        command: set(re.findall(r"`(\w+)`", words)) | {"schema", "command", "source", "damage"}
        for commands, words in rows
        for command in re.findall(r"`(\w+)`", commands)
    }
    for commands, words in rows:
        for command in re.findall(r"`(\w+)`", commands):
            for other in re.findall(r"as in `(\w+)`", words):
                found[command] |= found[other]
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.json")))
def test_each_field_of_the_json_is_documented(name: str) -> None:
    document = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    if "error" in document:
        assert set(document) == {"schema", "error"}
        return
    assert set(fields_in(document)) - documented_fields()[document["command"]] == set()


def check_gc(name: str, instance: str, found: Result) -> None:
    """Compare what `gc` printed about one instance; both forms have their own file."""
    assert (found.exit_code, found.stderr) == (0, "")
    kind = "json" if found.stdout.startswith("{") else "txt"
    check_golden(f"gc-{name}.{kind}", found.stdout.replace(instance, "NAME"))


def test_gc_that_only_lists(left: str, inspect: Inspect) -> None:
    check_gc("asks", left, inspect("gc", left, input="n\n"))
    check_gc("asks", left, inspect("gc", left, "--json"))
    assert left in instances()


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_gc_that_removes(form: tuple[str, ...], left: str, inspect: Inspect) -> None:
    check_gc("removes", left, inspect("gc", left, "--yes", *form))
    assert left not in instances()


@pytest.mark.parametrize("form", [(), ("--json",), ("--json", "--yes")])
def test_gc_with_nothing_to_do(
    form: tuple[str, ...], inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm.inspect.gc.instances", dict)
    check_gc("nothing", "-", inspect("gc", *form))


def test_snapshot(snapshot_file: Path, inspect: Inspect) -> None:
    found = inspect("snapshot", "again.kvbm", snapshot_file)
    assert re.fullmatch(r"again\.kvbm: [\d.]+ KiB\n", found.stderr)
    assert json.loads(inspect("show", "again.kvbm", "--json").stdout)["format"] == FORMAT_VERSION
