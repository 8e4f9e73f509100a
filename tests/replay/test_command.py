# SPDX-License-Identifier: Apache-2.0
"""The command line."""

import json
from pathlib import Path

import pytest

from kvbm.replay import command
from kvbm.replay.command import capacities, main
from kvbm.replay.policies import POLICIES
from kvbm.replay.trace import read


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    assert main(["make", str(path), "--requests", "80", "--seed", "2"]) == 0
    return path


def test_capacities_are_read_with_units_and_sorted() -> None:
    assert capacities("3000,1k,2.5k,1M,1k") == [1000, 2500, 3000, 1_000_000]


@pytest.mark.parametrize("text", ["", "k", "0", "-3", "many", "1k,,2k", "nan", "inf", "9999999m"])
def test_a_capacity_that_is_none_is_refused_by_name(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "trace", "--capacity", text])
    assert "is not a number of blocks" in capsys.readouterr().err


def test_run_prints_json_with_every_policy(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(made), "--capacity", "50,500", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["blocks"] for entry in found["capacities"]] == [50, 500]
    assert all(set(entry["hit_rate_of"]) == set(POLICIES) for entry in found["capacities"])
    assert found["trace"]["references"] == read(made).references


def test_run_with_a_disk_tier_says_what_each_tier_hit(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(made), "--capacity", "50", "--disk", "1k", "--alone"]
    assert main([*arguments, "--json"]) == 0
    filtered = json.loads(capsys.readouterr().out)["capacities"][0]
    assert main([*arguments, "--no-disk-filter", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["capacities"]
    assert found["hits_by_tier"]["disk"] > filtered["hits_by_tier"]["disk"]
    assert found["disk"]["capacity"] == 1000
    assert found["disk"]["written"] > filtered["disk"]["written"]
    assert main(arguments) == 0
    assert "disk hits" in capsys.readouterr().out


def test_the_size_of_a_disk_is_one_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "trace", "--capacity", "1k", "--disk", "1k,2k"])
    assert "is not one number of blocks" in capsys.readouterr().err


def test_run_prints_tables_and_draws_a_picture(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    picture = tmp_path / "hits.png"
    arguments = ["run", str(made), "--capacity", "50,500", "--token-bytes", "1000", "--alone"]
    assert main([*arguments, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "hit rate" in out
    assert "microseconds a call" in out
    assert "LRU" not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "/nowhere/trace", "--capacity", "1k"], "cannot read the trace /nowhere/trace"),
        (["make", "/nowhere/trace"], "cannot write /nowhere/trace"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_1(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_missing_library_is_named_with_its_remedy(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "LIBRARIES", ("no_such_library",))
    assert main(["run", str(made), "--capacity", "1k"]) == 1
    assert "no_such_library is missing: pip install kvbm[replay]" in capsys.readouterr().err


def test_a_policy_is_replayed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(tmp_path / "trace.jsonl")
    assert main(["make", trace, "--requests", "400"]) == 0
    arguments = ["run", trace, "--capacity", "50", "--alone", "--json"]
    found = []
    for policy in ("lru", "reuse", "kvbm.eviction.reuse:Reuse"):
        assert main([*arguments, "--policy", policy]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [entry["policy"] for entry in found] == ["lru", "reuse", "kvbm.eviction.reuse:Reuse"]
    plain, learned, same = (entry["capacities"][0]["decisions"] for entry in found)
    assert plain != learned == same
    assert main([*arguments[:-1], "--policy", "kvbm.eviction.reuse:Reuse", "--disk", "200"]) == 0
    assert "kvbm, Reuse" in capsys.readouterr().out


def test_a_policy_that_there_is_not_is_one_line_and_status_1(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(made), "--capacity", "50", "--policy", "arc"]) == 1
    error = capsys.readouterr().err
    assert "--policy='arc' is not valid (allowed: lru, reuse, or package.module:Class" in error
    assert error.count("\n") == 1
