# SPDX-License-Identifier: Apache-2.0
"""What each command prints, against golden files; their filters, exit statuses and errors.

KVBM_UPDATE_GOLDEN=1 writes the golden files anew; look at the difference before committing it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvbm._fast.segment import FORMAT_VERSION
from kvbm.inspect.cli import main
from tests.inspect.conftest import Inspect
from tests.inspect.samples import Sample

GOLDEN = Path(__file__).with_name("golden")
LISTS = ("blocks", "ops", "participants")
SHOWN = {
    "show": ("show",),
    "blocks": ("blocks",),
    "blocks-held": ("blocks", "--held"),
    "blocks-oldest": ("blocks", "--sort", "age", "--reverse", "--limit", 3),
    "tree": ("tree",),
    "ops": ("ops",),
    "participants": ("participants",),
    "verify": ("verify",),
}


def check_golden(name: str, found: str) -> None:
    path = GOLDEN / name
    if os.environ.get("KVBM_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHOWN)
def test_the_text_of_a_command_is_the_golden_one(
    name: str, snapshot_file: Path, inspect: Inspect
) -> None:
    words = SHOWN[name]
    result = inspect(words[0], snapshot_file, *words[1:])
    assert result.exit_code == 0
    check_golden(f"{name}.txt", result.stdout)


@pytest.mark.parametrize("name", SHOWN)
def test_the_json_of_a_command_is_the_golden_one(
    name: str, snapshot_file: Path, inspect: Inspect
) -> None:
    words = SHOWN[name]
    result = inspect(words[0], snapshot_file, *words[1:], "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert document["command"] == words[0]
    if "counters" in document:  # what other changes of the core move is not the point here
        assert document.pop("format") == FORMAT_VERSION
        document["counters"] = {k: v for k, v in document["counters"].items() if v}
    check_golden(f"{name}.json", json.dumps(document, indent=1) + "\n")


@pytest.mark.parametrize("reference", ["block:3", "slot:0", "digest:{digest}", "{digest}"])
def test_one_block_is_found_by_each_kind_of_reference(
    reference: str, snapshot_file: Path, inspect: Inspect
) -> None:
    first = json.loads(inspect("blocks", snapshot_file, "--json").stdout)["blocks"][0]
    result = inspect("block", reference.format(digest=first["digest"][:12]), snapshot_file)
    assert result.exit_code == 0
    if reference == "block:3":
        check_golden("block.txt", result.stdout)
    else:
        assert first["digest"] in result.stdout


def test_what_a_live_instance_has_is_found_by_its_name(sample: Sample, inspect: Inspect) -> None:
    live = json.loads(inspect("show", sample.name, "--json").stdout)
    assert live["state"] == "in use"
    assert live["kind"] == "live"
    assert live["blocks"] == {
        "reset": 41,
        "partial": 3,
        "registered": 20,
        "evicting": 0,
        "held": 1,
    }
    lines = json.loads(inspect("participants", sample.name, "--json").stdout)["participants"]
    assert [line["pid"] for line in lines] == [os.getpid()] * 3
    assert all(line["alive"] for line in lines)


def test_all_instances_are_listed(sample: Sample, inspect: Inspect) -> None:
    rows = json.loads(inspect("list", "--json").stdout)["instances"]
    mine = next(row for row in rows if row["instance"] == sample.name)
    assert mine["state"] == "in use"
    assert mine["leaders"] == 1
    assert mine["workers"] == 2
    assert mine["pools"]["host"] == {"total": 64, "free": 41, "used": 23}
    assert sample.name in inspect("list").stdout


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--state", "partial"), 3),
        (("--state", "reset"), 41),
        (("--held",), 4),
        (("--not-held",), 19),
        (("--holder", 0, "--state", "registered"), 1),
        (("--group", 1), 3),
        (("--position", 0, "--state", "registered"), 3),
        (("--parent", 5), 2),
        (("--older", 10), 10),
        (("--younger", 10, "--state", "registered"), 10),
        (("--tier", "disk"), 0),
        (("--tier", "host", "--limit", 2), 2),
    ],
)
def test_filters_of_blocks(
    options: tuple[object, ...], count: int, snapshot_file: Path, inspect: Inspect
) -> None:
    found = json.loads(inspect("blocks", snapshot_file, *options, "--json").stdout)
    assert len(found["blocks"]) == count


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("ops", "--kind", "store"), 1),
        (("ops", "--kind", "load"), 0),
        (("ops", "--state", "free", "--leader", 3), 128),
        (("ops", "--rows"), 1),
        (("participants", "--role", "worker"), 2),
        (("participants", "--dead"), 0),
        (("participants", "--alive", "--leader", 0), 3),
    ],
)
def test_filters_of_operations_and_participants(
    words: tuple[object, ...], count: int, snapshot_file: Path, inspect: Inspect
) -> None:
    found = json.loads(inspect(words[0], snapshot_file, *words[1:], "--json").stdout)
    assert len(found[str(words[0])]) == count


def test_the_rows_of_an_operation_name_device_blocks_and_slots(
    snapshot_file: Path, inspect: Inspect
) -> None:
    document = json.loads(inspect("ops", snapshot_file, "--rows", "--json").stdout)
    rows = document["ops"][0]["rows"]
    assert [row["device_block"] for row in rows] == [7, 8, 9]


def test_the_tree_is_cut_at_a_depth_and_a_size(snapshot_file: Path, inspect: Inspect) -> None:
    whole = json.loads(inspect("tree", snapshot_file, "--json").stdout)
    assert (whole["blocks"], whole["roots"], whole["unreachable"]) == (23, 4, 0)
    assert [run["length"] for run in whole["runs"]] == [6, 4, 2, 5, 3, 3]
    flat = json.loads(inspect("tree", snapshot_file, "--depth", 1, "--json").stdout)
    assert [run["level"] for run in flat["runs"]] == [0, 0, 0, 0]
    large = json.loads(inspect("tree", snapshot_file, "--least", 5, "--json").stdout)
    assert [run["length"] for run in large["runs"]] == [6, 5]


@pytest.mark.parametrize("command", sorted(main.commands))
def test_each_command_explains_itself(command: str, inspect: Inspect) -> None:
    result = inspect(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert len(result.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "no-such-thing"), "no-such-thing is no instance and no file"),
        (("show", "."), ". is not a file"),
        (("block", "slot:63", "sample.kvbm"), "slot:63: there is no such block"),
        (("block", "slot:x", "sample.kvbm"), "slot:x is not understood"),
        (("block", "zz", "sample.kvbm"), "zz is not understood"),
        (("map", "picture.gif", "sample.kvbm"), "must end with .png or .svg"),
        (("map", "missing/picture.svg", "sample.kvbm"), "cannot be written"),
        (("snapshot", "missing/copy.kvbm", "sample.kvbm"), "cannot be written"),
        (("gc", "no-such-thing"), "no-such-thing is no instance"),
    ],
)
def test_an_error_is_one_line_and_the_status_2(
    words: tuple[object, ...], message: str, snapshot_file: Path, inspect: Inspect
) -> None:
    result = inspect(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_a_snapshot_of_a_snapshot_is_the_same(snapshot_file: Path, inspect: Inspect) -> None:
    assert inspect("snapshot", "again.kvbm", snapshot_file).exit_code == 0
    first, second = (
        inspect("blocks", name, "--json").stdout.replace(str(name), "")
        for name in (snapshot_file, "again.kvbm")
    )
    assert first == second
    assert Path("again.kvbm").stat().st_mode & 0o077 == 0


def test_what_writes_a_file_says_so_as_json(snapshot_file: Path, inspect: Inspect) -> None:
    found = json.loads(inspect("snapshot", "again.kvbm", snapshot_file, "--json").stdout)
    assert found == {
        "schema": 1,
        "command": "snapshot",
        "source": "sample.kvbm",
        "file": "again.kvbm",
        "bytes": Path("again.kvbm").stat().st_size,
    }
    found = json.loads(inspect("map", "map.svg", snapshot_file, "--what", "tree", "--json").stdout)
    assert (found["command"], found["what"], found["by"]) == ("map", "tree", "state")
    assert Path(found["file"]).exists()


@pytest.mark.parametrize("command", sorted(main.commands))
def test_each_command_can_print_json(command: str) -> None:
    assert "--json" in {word for one in main.commands[command].params for word in one.opts}


def test_diff_tells_what_came_and_went(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inspect: Inspect
) -> None:
    from tests.inspect.samples import chain, digests

    monkeypatch.chdir(tmp_path)
    assert inspect("snapshot", "before.kvbm", sample.name).exit_code == 0
    chain(sample.table, digests(2, "later"))
    found = json.loads(inspect("diff", "before.kvbm", sample.name, "--json").stdout)
    assert (found["came"], found["went"]) == (2, 0)
    assert found["registered"] == {"before": 20, "after": 22}
    assert found["counters"]["published"] == 2
    assert found["same_content"]
    back = inspect("diff", sample.name, "before.kvbm", "--limit", 1).stdout
    assert "went         2 blocks" in back
    assert "  - 1 more" in back
