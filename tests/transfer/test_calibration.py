# SPDX-License-Identifier: Apache-2.0
"""The choice between ways of copying, on simulated devices whose calls take longer or shorter."""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvbm._fast.cuda_backend import CudaBackend
from kvbm._fast.cuda_device import CudaDevice
from kvbm.transfer import calibration
from kvbm.transfer.backends import Device, RankCopies
from kvbm.transfer.calibration import Trial, crossover, crossover_from, matters, result_file
from kvbm.transfer.geometry import KvGeometry, geometry_of
from kvbm.transfer.method import Crossover
from tests.copy_rig import BLOCKS, FakeMemory
from tests.fast.fake_cuda import FakeCuda
from tests.transfer.kv_tensors import ArrayTensor
from tests.transfer.test_backends import LAYOUT

KIB = 1 << 10
SMALL = Trial(sizes=(8 * KIB, 16 * KIB), direction_bytes=512 * KIB, chunk_bytes=256 * KIB, rounds=1)
LONG = 3e-4
"""Seconds: far more than all else that the simulated driver does for a piece."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvbm"


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    made = FakeCuda()
    yield made
    made.costs()
    assert made.alive == 0


@pytest.fixture
def device(cuda: FakeCuda) -> Iterator[CudaDevice]:
    opened = CudaDevice(0, library=cuda.path)
    yield opened
    opened.close()


# ---- the choice ----------------------------------------------------------------------------------
def times(straight: list[int], other: list[int]) -> dict[str, dict[int, int]]:
    sizes = (8, 16, 32)
    return {
        "straight": dict(zip(sizes, straight, strict=True)),
        "staged": dict(zip(sizes, other, strict=True)),
    }


@pytest.mark.parametrize(
    ("straight", "staged", "below"),
    [
        ([400, 200, 100], [100, 100, 100], 32),
        ([400, 100, 100], [100, 100, 100], 16),
        ([100, 100, 100], [100, 100, 100], 8),
        ([400, 300, 200], [100, 100, 100], 64),
        ([100, 200, 100], [100, 100, 100], 32),
        ([102, 102, 102], [100, 100, 100], 8),
    ],
)
def test_pieces_go_straight_from_the_size_on_at_which_that_is_as_fast(
    straight: list[int], staged: list[int], below: int
) -> None:
    assert crossover_from(times(straight, staged)).staged_below_bytes == below


def test_what_was_not_measured_stays_as_it_is_by_default() -> None:
    assert crossover_from({}) == Crossover()
    found = crossover_from({"straight": {8: 1}, "pitched": {8: 1}})
    assert found == Crossover(Crossover().staged_below_bytes, 8)


def test_sizes_without_their_doubles_are_refused() -> None:
    with pytest.raises(ValueError, match="twice the one before"):
        Trial(sizes=(8, 32))


def test_long_pieces_leave_no_choice() -> None:
    def shape(chunk: int) -> list[KvGeometry]:
        return [geometry_of({"a": ArrayTensor(np.zeros((2, chunk), np.uint8))}, 2)]

    assert matters(shape(64 * KIB))
    assert not matters(shape(512 * KIB))


# ---- the measurement -----------------------------------------------------------------------------
def test_where_each_piece_is_dear_short_ones_are_staged_or_pitched(
    cuda: FakeCuda, device: CudaDevice
) -> None:
    cuda.costs(piece=LONG)
    assert crossover(device, SMALL) == Crossover(32 * KIB, 32 * KIB)


def test_where_a_kernel_and_a_2d_copy_are_dear_everything_goes_straight(
    cuda: FakeCuda, device: CudaDevice
) -> None:
    cuda.costs(kernel=100 * LONG, pitched=100 * LONG)
    assert crossover(device, SMALL) == Crossover(8 * KIB, 8 * KIB)


def test_nothing_is_kept_on_the_device_or_registered(cuda: FakeCuda, device: CudaDevice) -> None:
    before = cuda.alive
    crossover(device, SMALL)
    assert cuda.alive == before


@pytest.mark.parametrize(
    "symbol", ["cuMemAlloc", "cuMemHostRegister", "cuMemcpyBatchAsync", "cuEventQuery"]
)
def test_where_it_fails_the_defaults_serve_and_nothing_is_kept(
    cuda: FakeCuda,
    device: CudaDevice,
    cache: Path,
    symbol: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = cuda.alive
    cuda.fail(symbol, error=2)
    with caplog.at_level(logging.WARNING):
        assert crossover(device, SMALL) == Crossover()
    assert "could not be measured" in caplog.text
    assert not cache.exists()
    assert cuda.alive == before


def test_without_room_for_a_staging_buffer_its_default_stays(
    cuda: FakeCuda, device: CudaDevice
) -> None:
    cuda.costs(piece=LONG)
    cuda.fail("cuMemAlloc", error=2, after=1)
    assert crossover(device, SMALL) == Crossover(Crossover().staged_below_bytes, 32 * KIB)


# ---- the file ------------------------------------------------------------------------------------
def test_a_device_is_measured_once(
    cuda: FakeCuda, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.costs(piece=LONG)
    found = crossover(device, SMALL)
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("measured again"))
    assert crossover(device, SMALL) == found
    assert [path.name for path in result_file(device).parent.iterdir()] == [
        result_file(device).name
    ]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "Unterminated|Expecting|delimiter"),
        (lambda text: "[]", "list indices"),
        (lambda text: text.replace('"uuid": "', '"uuid": "00'), "not this device's"),
        (lambda text: text.replace("32768", "12345"), "not this device's"),
        (lambda text: text.replace("32768", "true"), "not this device's"),
        (lambda text: text.replace("staged_below", "other"), "staged_below_bytes"),
    ],
    ids=["cut", "no object", "other device", "not measured", "no number", "missing"],
)
def test_a_file_that_is_damaged_or_foreign_is_replaced_with_one_line(
    cuda: FakeCuda,
    device: CudaDevice,
    damage: object,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cuda.costs(piece=LONG)
    found = crossover(device, SMALL)
    path = result_file(device)
    good = path.read_text()
    path.write_text(damage(good))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert crossover(device, SMALL) == found
    assert [record.levelno for record in caplog.records if record.levelno != logging.INFO] == [
        logging.WARNING
    ]
    assert json.loads(path.read_text())["key"] == json.loads(good)["key"]
    assert re.search(reason, caplog.text)


def test_a_folder_that_cannot_be_written_costs_a_line_only(
    cuda: FakeCuda, device: CudaDevice, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file is in the way")
    cuda.costs(piece=LONG)
    with caplog.at_level(logging.WARNING):
        assert crossover(device, SMALL).staged_below_bytes == 32 * KIB
    assert "cannot be written" in caplog.text
    assert os.listdir(cache.parent) == ["kvbm"]


@pytest.mark.parametrize("folder", ["", "relative"])
def test_without_a_usable_variable_the_file_is_in_the_home_folder(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    monkeypatch.setenv("HOME", "/folder")
    assert result_file(device).parent == Path("/folder/.cache/kvbm")


# ---- who asks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_backend_uses_what_was_measured_if_it_may(
    monkeypatch: pytest.MonkeyPatch, calibrated: bool
) -> None:
    asked = []
    monkeypatch.setattr(calibration, "crossover", lambda d: asked.append(d) or Crossover(1, 1))
    memory = FakeMemory(staged=True)
    with mmap.mmap(-1, LAYOUT.total_bytes) as arena:
        copies = RankCopies(
            Device("cuda", library=memory.cuda.path),
            [geometry_of(memory.tensors, BLOCKS)],
            LAYOUT,
            arena,
            rank=0,
            calibrated=calibrated,
        )
        assert isinstance(copies.backend, CudaBackend)
        assert len(asked) == calibrated
        assert (copies.backend.staging_bytes == 0) is calibrated
        copies.close()
        del copies
