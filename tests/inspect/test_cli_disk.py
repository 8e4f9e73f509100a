# SPDX-License-Identifier: Apache-2.0
"""What the commands show of a disk tier: live, in a snapshot, and of slabs alone."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from kvbm._fast.keys import Keys
from kvbm.inspect.capture import capture, write_snapshot
from kvbm.inspect.cli import main
from kvbm.instance import remove
from tests.fast.instances import cache, digests
from tests.fast.test_disk_table import disk_table
from tests.inspect.conftest import Inspect
from tests.inspect.disk_samples import DiskSample, torn_superblock
from tests.inspect.test_cli import check_golden

TIER = ("--tier", "disk")
SHOWN: dict[str, tuple[object, ...]] = {
    "disk-show": ("show",),
    "disk-blocks": ("blocks", *TIER),
    "disk-tree": ("tree", *TIER),
    "disk-participants": ("participants", *TIER),
    "disk-verify": ("verify",),
}
OF_SLAB: dict[str, tuple[object, ...]] = {
    "slab-show": ("show",),
    "slab-blocks": ("blocks", "--sort", "position"),
    "slab-tree": ("tree",),
    "slab-verify": ("verify",),
}


def without_ages(text: str) -> str:
    """What a slab says differs with the moment at which it is read in its ages alone."""
    text = re.sub(r'"age_seconds": [\d.]+', '"age_seconds": 0', text)
    text = re.sub(r'"owner": "[^"]+"', '"owner": "somebody"', text)
    text = re.sub(r"owner        \S+,", "owner        somebody,", text)
    return re.sub(r" +\d+ (?:d|h|min|s)$", " AGE", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", SHOWN)
def test_the_disk_tier_in_a_snapshot_is_the_golden_one(
    name: str, disk_file: Path, inspect: Inspect
) -> None:
    words = SHOWN[name]
    result = inspect(words[0], disk_file, *words[1:])
    assert result.exit_code == 0
    check_golden(f"{name}.txt", result.stdout)


@pytest.mark.parametrize("name", OF_SLAB)
def test_a_slab_alone_is_the_golden_one(name: str, slab_file: Path, inspect: Inspect) -> None:
    words = OF_SLAB[name]
    result = inspect(words[0], slab_file, *words[1:])
    assert result.exit_code == 0
    check_golden(f"{name}.txt", without_ages(result.stdout))


@pytest.mark.parametrize("name", ["show", "tree"])
def test_the_json_of_a_slab_is_the_golden_one(name: str, slab_file: Path, inspect: Inspect) -> None:
    document = json.loads(without_ages(inspect(name, slab_file, "--json").stdout))
    document.pop("counters", None)
    check_golden(f"slab-{name}.json", json.dumps(document, indent=1) + "\n")


def test_the_disk_tier_in_json(disk_file: Path, inspect: Inspect) -> None:
    found = json.loads(inspect("show", disk_file, "--json").stdout)
    assert found["pools"]["disk"] == {"total": 32, "free": 14, "used": 18}
    tier = found["disk"]
    assert tier["state"] == "in use"
    assert tier["blocks"] == {
        "reset": 14,
        "partial": 2,
        "registered": 16,
        "evicting": 0,
        "held": 0,
    }
    assert tier["counters"]["reserved"] == 2
    assert [slab["headers"] for slab in tier["slabs"]] == [
        {"empty": 14, "valid": 17, "torn": 1, "foreign": 0}
    ] * 2
    assert [slab["belongs"] for slab in tier["slabs"]] == [True, True]
    assert [slab["without_parent"] for slab in tier["slabs"]] == [1, 1]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (TIER, 18),
        ((*TIER, "--state", "partial"), 2),
        ((*TIER, "--position", 0, "--state", "registered"), 2),
        (("--tier", "host"), 23),
        ((), 23),
    ],
)
def test_filters_of_blocks_are_those_of_the_tier(
    options: tuple[object, ...], count: int, disk_file: Path, inspect: Inspect
) -> None:
    found = json.loads(inspect("blocks", disk_file, *options, "--json").stdout)
    assert len(found["blocks"]) == count


@pytest.mark.parametrize("reference", ["disk:22", "{digest}"])
def test_a_block_on_disk_is_shown_with_the_headers_of_its_slot(
    reference: str, disk: DiskSample, inspect: Inspect
) -> None:
    blocks = json.loads(inspect("blocks", disk.name, *TIER, "--json").stdout)["blocks"]
    wanted = next(one for one in blocks if one["placements"]["disk"]["slot"] == 22)
    words = ("block", reference.format(digest=wanted["digest"][:12]), disk.name, "--json")
    (found,) = json.loads(inspect(*words).stdout)["blocks"]
    assert found["tier"] == "disk"
    assert found["digest"] == wanted["digest"]
    assert [(one["rank"], one["state"]) for one in found["slot_headers"]] == [
        (0, "valid"),
        (1, "valid"),
    ]
    assert {one["digest"] for one in found["slot_headers"]} == {wanted["digest"]}
    assert "(disk tier)" in inspect(*words[:-1]).stdout


def test_a_slot_without_a_word_is_one_of_the_host_tier(disk: DiskSample, inspect: Inspect) -> None:
    (found,) = json.loads(inspect("block", "0", disk.name, "--json").stdout)["blocks"]
    assert found["tier"] == "host"
    assert inspect("block", "disk:12", disk.name).exit_code == 0  # being written: no header yet
    assert inspect("block", "disk:25", disk.name).exit_code == 2


def test_a_slot_of_a_slab_alone_is_a_disk_slot(slab_file: Path, inspect: Inspect) -> None:
    (found,) = json.loads(inspect("block", "21", slab_file, "--json").stdout)["blocks"]
    assert found["placements"]["disk"]["slot"] == 21
    assert [one["block"] for one in found["chain"]] == [20]
    assert inspect("block", "28", slab_file).exit_code == 2


def test_after_a_reboot_an_instance_is_found_by_its_slabs(
    disk: DiskSample, inspect: Inspect
) -> None:
    for rank in range(2):
        (disk.folder / f"kvbm-rebooted.disk.{rank}").write_bytes(disk.slab(rank).read_bytes())
    rows = json.loads(inspect("list", "--json").stdout)["instances"]
    mine = {row["instance"]: row for row in rows if row["instance"] in (disk.name, "rebooted")}
    assert mine["rebooted"]["state"] == "on disk"
    assert mine["rebooted"]["pools"]["disk"]["used"] == 17
    assert mine[disk.name]["state"] == "in use"
    assert mine[disk.name]["pools"]["disk"]["used"] == 18
    assert mine[disk.name]["slab_bytes"] == mine["rebooted"]["slab_bytes"] > 0
    found = json.loads(inspect("show", "rebooted", "--json").stdout)
    assert [slab["rank"] for slab in found["slabs"]] == [0, 1]
    remove("rebooted")


def test_a_slab_whose_superblock_is_torn_is_decoded_as_far_as_it_goes(
    slab_file: Path, inspect: Inspect
) -> None:
    slab_file.write_bytes(torn_superblock(slab_file.read_bytes()))
    result = inspect("show", slab_file)
    assert result.exit_code == 0
    assert "damaged" in result.stdout.splitlines()[0]
    assert "17 valid" in result.stdout
    assert "its superblock cannot be read; sizes from headers" in result.stdout
    assert len(inspect("blocks", slab_file).stdout.splitlines()) == 18
    broken = inspect("verify", slab_file)
    assert broken.exit_code == 1
    assert "violated     slabs: " in broken.stdout


def test_a_snapshot_of_a_slab_shows_the_same(slab_file: Path, inspect: Inspect) -> None:
    assert inspect("snapshot", "copy.kvbm", slab_file).exit_code == 0
    shown = without_ages(inspect("blocks", slab_file).stdout)
    assert without_ages(inspect("blocks", "copy.kvbm").stdout) == shown
    assert Path("copy.kvbm").stat().st_size < slab_file.stat().st_size


def test_a_plain_copy_of_the_disk_tiers_segment_is_known_as_one(
    disk: DiskSample, inspect: Inspect
) -> None:
    copy = disk.folder / "copy"
    copy.write_bytes(Path(f"/dev/shm/{disk.disk.name.lstrip('/')}").read_bytes())
    found = json.loads(inspect("show", copy, "--json").stdout)
    assert found["pools"]["disk"]["used"] == 18
    assert "host" not in found["pools"]


def test_both_tiers_are_drawn(disk: DiskSample, inspect: Inspect) -> None:
    picture = disk.folder / "map.svg"
    assert inspect("map", picture, disk.name).exit_code == 0
    text = picture.read_text()
    assert "host: 23 of 64 slots" in text
    assert "disk: 18 of 32 slots" in text


def test_what_came_and_went_on_disk(disk_file: Path, disk: DiskSample, inspect: Inspect) -> None:
    cache(disk.table, Keys(digests(3, "came later")))
    found = json.loads(inspect("diff", disk_file, disk.name, *TIER, "--json").stdout)
    assert (found["came"], found["went"]) == (3, 0)
    assert "slot" in inspect("diff", disk_file, disk.name, *TIER).stdout


def test_a_dead_leader_of_the_disk_tier_is_said(disk_file: Path, inspect: Inspect) -> None:
    taken = capture(str(disk_file))
    assert taken.disk is not None
    gone = replace(taken.disk, locked=frozenset(), in_use=False)
    write_snapshot(replace(taken, disk=gone), Path("dead.kvbm"))
    assert "disk tier    dead" in inspect("show", "dead.kvbm").stdout
    result = inspect("verify", "dead.kvbm")
    assert result.exit_code == 0
    assert "disk at rest" in result.stdout
    assert "what died on lines [0] has not been recovered" in result.stdout


def test_what_a_killed_leader_left_on_disk_is_shown(disk: DiskSample, inspect: Inspect) -> None:
    child = os.fork()
    if child == 0:
        table = disk_table(disk.disk)
        table.reserve_run(Keys(digests(3, "killed")), 0, 3, None)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    words = ("participants", disk.name, *TIER, "--dead", "--json")
    (dead,) = json.loads(inspect(*words).stdout)["participants"]
    assert (dead["leader"], dead["pid"], dead["pins"]) == (1, child, 3)
    left = json.loads(inspect("blocks", disk.name, *TIER, "--holder", 1, "--json").stdout)
    assert [one["state"] for one in left["blocks"]] == ["partial"] * 3
    result = inspect("verify", disk.name)
    assert result.exit_code == 0
    assert "disk at rest" in result.stdout
    assert "what died on lines [1] has not been recovered" in result.stdout


def test_a_device_that_a_snapshot_makes_up_is_shown_as_far_as_it_makes_sense(
    disk_file: Path, inspect: Inspect
) -> None:
    taken = capture(str(disk_file))
    assert taken.disk is not None
    odd = {"name": 7, "wear": 0.5, "lifetime_written_bytes": "much", "written_bytes": [1]}
    write_snapshot(replace(taken, disk=replace(taken.disk, device=odd)), Path("odd.kvbm"))
    found = json.loads(inspect("show", "odd.kvbm", "--json").stdout)["disk"]["device"]
    assert {name for name, value in found.items() if value is not None} == {"wear"}
    assert "50.0 % of its life used" in inspect("show", "odd.kvbm").stdout


def test_every_command_with_a_tier_names_it_in_its_help() -> None:
    for name in ("blocks", "tree", "participants", "diff"):
        assert any("--tier" in option.opts for option in main.commands[name].params)
