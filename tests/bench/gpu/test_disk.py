# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu.disk`` runs on tensors in host memory, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from bench.gpu import disk as command
from bench.gpu.disk_engine import DiskEngine
from bench.gpu.lane import CacheShape

SMALL = CacheShape("small", 2, 8 << 10)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[DiskEngine]:
    """An engine whose chains are both on disk."""
    made = DiskEngine(SMALL, 16, tmp_path, "cpu")
    yield made
    made.close()


def test_a_chain_comes_from_disk_to_the_device(engine: DiskEngine) -> None:
    assert min(engine.load(0)) > 0
    assert min(engine.load(1)) > 0
    assert engine.counters()["blocks_loaded"] >= 2 * engine.blocks - 1


def test_other_bytes_on_the_device_are_noticed(engine: DiskEngine) -> None:
    for tensor in engine.tensors.values():
        tensor[3] ^= 1  # what was stored is compared with what is there now
    with pytest.raises(RuntimeError, match="other bytes"):
        engine.load(0)


def test_the_command_prints_a_line_for_each_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHAPES", (SMALL,))
    monkeypatch.setattr(command, "ways", lambda: {"preadv": (), "POSIX": ("POSIX",)})
    arguments = ["--folder", str(tmp_path), "--device", "cpu", "--mib", "1", "--rounds", "1"]
    assert command.main([*arguments, "--no-probe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| small | preadv | ") for line in lines)
    assert list(tmp_path.iterdir()) == []
