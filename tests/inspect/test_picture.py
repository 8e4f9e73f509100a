# SPDX-License-Identifier: Apache-2.0
"""The map has a cell for each slot, coloured by what was asked for, in both kinds of file."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvbm.inspect import picture
from kvbm.inspect.capture import capture
from kvbm.inspect.decode import Segment
from tests.inspect.conftest import Inspect


def colours(drawing: picture.Drawing) -> Counter[str]:
    """Cells of each colour, without the one of the legend."""
    found = Counter(colour for *_, colour in drawing.rects)
    return Counter({colour: count - 1 for colour, count in found.items() if count > 1})


@pytest.fixture(scope="module")
def segment(frozen_file: Path) -> Segment:
    return Segment(capture(str(frozen_file)))


def test_each_slot_is_a_cell_of_the_colour_of_its_state(segment: Segment) -> None:
    found = colours(picture.draw_tiers(segment, "state"))
    assert found == {
        picture.EMPTY: 41,
        picture.STATE_COLOURS["registered"]: 19,
        picture.HELD: 1,
        picture.STATE_COLOURS["partial"]: 3,
    }


def test_age_owner_and_group_colour_the_same_cells(segment: Segment) -> None:
    by_age = colours(picture.draw_tiers(segment, "age"))
    assert by_age[picture.AGE_COLOURS[0]] == 10
    assert by_age[picture.AGE_COLOURS[1]] == 10
    assert by_age[picture.STATE_COLOURS["partial"]] == 3
    by_owner = colours(picture.draw_tiers(segment, "owner"))
    assert by_owner[picture.PALETTE[0]] == 4
    by_group = colours(picture.draw_tiers(segment, "group"))
    assert (by_group[picture.PALETTE[0]], by_group[picture.PALETTE[1]]) == (20, 3)


def test_the_tree_has_a_bar_for_each_run_below_its_parent(segment: Segment) -> None:
    drawing = picture.draw_tree(segment, "group")
    bars = drawing.rects[2:]  # after the legend of two groups
    assert len(bars) == 6
    (x, y, wide, high, _), (x1, y1, wide1, _, _), (x2, y2, wide2, _, _) = bars[:3]
    assert (x1, y1) == (x, pytest.approx(y + high + 1))
    assert y2 == y1
    assert x2 == pytest.approx(x1 + wide1 + 1)
    assert wide1 + wide2 < wide


def test_bars_in_a_png_are_one_pixel_apart_wherever_they_begin(tmp_path: Path) -> None:
    from PIL import Image

    drawing = picture.Drawing(width=200, height=8)
    for number in range(12):
        drawing.rects.append((number * 10.3, 0.0, 9.3, 8.0, "#000000"))
    picture.write(drawing, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        line = [image.getpixel((x, 4)) == (255, 255, 255) for x in range(round(11 * 10.3))]
    assert sum(line) == 11  # behind each bar but the last
    assert not any(a and b for a, b in itertools.pairwise(line))


@pytest.mark.parametrize("what", ["tiers", "tree"])
@pytest.mark.parametrize("by", picture.COLOURS)
def test_both_kinds_of_file_can_be_read(
    what: str, by: str, snapshot_file: Path, inspect: Inspect
) -> None:
    from PIL import Image

    for name in ("map.svg", "map.png"):
        result = inspect("map", name, snapshot_file, "--what", what, "--by", by)
        assert result.exit_code == 0, result.stderr
    root = ElementTree.parse("map.svg").getroot()
    with Image.open("map.png") as image:
        assert image.size == (int(root.attrib["width"]), int(root.attrib["height"]))
        assert len(image.convert("RGB").getcolors(100_000)) > 2


def test_a_large_tier_stays_a_picture_of_bounded_size() -> None:
    import numpy as np

    drawing = picture.Drawing()
    cells = np.arange(1_000_000) // 50_000 % 2
    picture._draw_cells(drawing, cells, ["#000000", "#ffffff"])
    assert drawing.height < 1200
    assert len(drawing.rects) < 3000
