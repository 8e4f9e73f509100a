# SPDX-License-Identifier: Apache-2.0
"""A picture of the tiers, one cell a slot, and of the tree, as rectangles and texts.

The same drawing is written as SVG (here) or PNG (Pillow, which is imported for it alone).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm._fast import contract
from kvbm.errors import InspectError
from kvbm.inspect.decode import Segment
from kvbm.inspect.tree import Node, nodes, tree_of

WIDTH = 1200
MARGIN = 16
LINE = 18
NAMESPACE = "http://www.w3.org/2000/svg"
BACKGROUND, INK, EMPTY = "#ffffff", "#222222", "#e8e8e8"
# Distinguishable with the usual colour blindness (Okabe and Ito), then lighter ones of the same.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999",
    "#66aad1", "#f0c566", "#66c5ab", "#e0afca", "#9ad2f2", "#e69e66", "#f6ef8e", "#c2c2c2",
)  # fmt: skip
STATE_COLOURS = {"partial": "#e69f00", "registered": "#0072b2", "evicting": "#cc79a7"}
HELD = "#009e73"
AGE_COLOURS = ("#08306b", "#2171b5", "#6baed6", "#c6dbef")
AGE_LIMITS = (10.0, 60.0, 600.0)
COLOURS = ("state", "age", "owner", "group")


@dataclass
class Drawing:
    """Rectangles (x, y, width, height, colour) and texts (x, y of the base line, text)."""

    width: int = WIDTH
    height: int = 0
    rects: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    texts: list[tuple[float, float, str]] = field(default_factory=list)

    def legend(self, entries: dict[str, str]) -> None:
        """Add a line that says what the colours mean."""
        x = float(MARGIN)
        self.height += LINE
        for text, colour in entries.items():
            wide = 7.0 * len(text) + 36
            if x + wide > self.width - MARGIN:
                x, self.height = float(MARGIN), self.height + LINE
            self.rects.append((x, self.height - 12, 12, 12, colour))
            self.texts.append((x + 16, self.height - 2, text))
            x += wide
        self.height += LINE // 2

    def heading(self, text: str) -> None:
        """Add a line of text."""
        self.height += LINE
        self.texts.append((MARGIN, self.height - 4, text))


def svg(drawing: Drawing) -> Iterator[str]:
    """Lines of an SVG file."""
    size = f'width="{drawing.width}" height="{drawing.height + MARGIN}"'
    yield f'<svg xmlns="{NAMESPACE}" {size} font-family="monospace" font-size="12">'
    yield f'<rect width="100%" height="100%" fill="{BACKGROUND}"/>'
    for x, y, wide, high, colour in drawing.rects:
        yield (f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" fill="{colour}"/>')
    for x, y, text in drawing.texts:
        yield f'<text x="{x:g}" y="{y:g}" fill="{INK}">{escape(text)}</text>'
    yield "</svg>"


def write(drawing: Drawing, path: Path) -> None:
    """Write as the ending of the path says: .svg or .png.

    Raises
    ------
    InspectError
        Another ending, Pillow is missing, or the file cannot be written.
    """
    try:
        if path.suffix == ".svg":
            path.write_text("\n".join(svg(drawing)) + "\n", encoding="utf-8")
        elif path.suffix == ".png":
            _write_png(drawing, path)
        else:
            raise InspectError(f"{path}: the name must end with .png or .svg")
    except OSError as error:
        raise InspectError(f"{path} cannot be written: {error.strerror}") from None


def _write_png(drawing: Drawing, path: Path) -> None:
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise InspectError(
            "PNG needs Pillow (pip install 'kvbm[inspect]'); .svg needs nothing"
        ) from None
    image = Image.new("RGB", (drawing.width, drawing.height + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for x, y, wide, high, colour in drawing.rects:
        draw.rectangle((x, y, max(x, x + wide - 1), max(y, y + high - 1)), fill=colour)
    for x, y, text in drawing.texts:
        draw.text((x, y - 11), text, fill=INK)
    image.save(path)


# ---- tiers ---------------------------------------------------------------------------------------
def draw_tiers(segment: Segment, colour: str) -> Drawing:
    """One cell a slot, tier below tier.

    Parameters
    ----------
    colour : {"state", "age", "owner", "group"}
        What the colours say.
    """
    drawing = Drawing()
    tables = [segment] if segment.disk is None else [segment, segment.disk]
    painted = [block_colours(table, colour) for table in tables]
    legends = {text: paint for _, legend in painted for text, paint in legend.items()}
    drawing.heading(f"{segment.capture.source}: slots by {colour}")
    drawing.legend({"free": EMPTY, **legends})
    for table, (colours, legend) in zip(tables, painted, strict=True):
        for tier, name in table.tiers.items():
            capacity = table.capacity(name)
            if capacity == 0:
                continue
            cells = _cells(table, tier, capacity, colours)
            used = int((cells >= 0).sum())
            drawing.heading(f"{name}: {used} of {capacity} slots")
            _draw_cells(drawing, cells, [*legend.values()])
    return drawing


def block_colours(segment: Segment, what: str) -> tuple[npt.NDArray[np.int64], dict[str, str]]:
    """Number of each block's colour in the legend, and the legend: text to colour."""
    blocks = segment.blocks
    if what == "state":
        held = blocks.of_state("registered") & (blocks.holders != 0)
        numbers = np.where(held, 3, np.clip(blocks.state - 1, 0, 2))
        return numbers, {**STATE_COLOURS, "registered and held": HELD}
    if what == "age":
        now = segment.capture.monotonic_ns or int(blocks.registered_ns.max(initial=0))
        age = (now - blocks.registered_ns) / 1e9
        texts = ("< 10 s", "< 60 s", "< 10 min", "older")
        numbers = np.searchsorted(AGE_LIMITS, age, side="right")
        found = dict(zip(texts, AGE_COLOURS, strict=True))
        found["being filled"] = STATE_COLOURS["partial"]  # it has no age yet
        return np.where(blocks.of_state("partial"), len(texts), numbers), found
    if what == "owner":
        first = np.zeros(len(blocks), np.int64)
        for leader in reversed(range(contract.LEADERS)):
            first = np.where(blocks.holders >> leader & 1, leader + 1, first)
        owners = {"held by nobody": "#b8b8b8"}
        owners |= {f"leader {n}": PALETTE[n] for n in range(contract.LEADERS)}
        return first, owners
    groups = np.unique(blocks.group[blocks.state != 0])[: len(PALETTE)]
    numbers = np.clip(np.searchsorted(groups, blocks.group), 0, max(0, len(groups) - 1))
    return numbers, {f"group {n}": PALETTE[i] for i, n in enumerate(groups)}


def _cells(
    segment: Segment, tier: int, capacity: int, colours: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Colour of each slot, -1 for a free one."""
    blocks = segment.blocks
    placed = (blocks.state != 0) & (blocks.placement_state[:, tier] != 0)
    placed &= blocks.slot[:, tier] < capacity
    cells = np.full(capacity, -1, np.int64)
    cells[blocks.slot[placed, tier]] = colours[placed]
    return cells


def _draw_cells(drawing: Drawing, cells: npt.NDArray[np.int64], palette: list[str]) -> None:
    """Rows of cells; neighbours of one colour are one rectangle."""
    room = drawing.width - 2 * MARGIN
    # Cells between 1 and 12 pixels wide, so that a tier is about a third as high as it is wide.
    side = min(12, max(1, int(math.sqrt(room * room / 3 / len(cells)))))
    columns = room // side
    gap = 1 if side > 4 else 0
    for row, start in enumerate(range(0, len(cells), columns)):
        line = cells[start : start + columns]
        begins = np.arange(len(line)) if gap else np.flatnonzero(np.diff(line, prepend=-2))
        ends = np.append(begins[1:], len(line))
        y = float(drawing.height + row * side)
        for begin, end in zip(begins, ends, strict=True):
            colour = EMPTY if line[begin] < 0 else palette[int(line[begin])]
            x = float(MARGIN + begin * side)
            drawing.rects.append((x, y, float((end - begin) * side - gap), side - gap, colour))
    drawing.height += -(-len(cells) // columns) * side + LINE // 2


# ---- tree ----------------------------------------------------------------------------------------
def draw_tree(segment: Segment, colour: str, least: int = 1) -> Drawing:
    """Runs as bars from the root down: as wide as the blocks below, as high as they are long."""
    drawing = Drawing()
    colours, legend = block_colours(segment, colour)
    tree = tree_of(segment)
    total = max(1, sum(root.total for root in tree.roots))
    drawing.heading(f"{segment.capture.source}: tree by {colour}, {len(tree.roots)} roots")
    drawing.legend(legend)
    palette = [*legend.values()]
    positions = segment.blocks.position
    deepest = int(positions[segment.blocks.state != 0].max(initial=0)) + 1
    scale_x = (drawing.width - 2 * MARGIN) / total
    scale_y = min(24.0, 600.0 / deepest)
    top = float(drawing.height)
    place = {-1: float(MARGIN)}
    for node in nodes(tree, least=max(least, int(0.5 / scale_x))):
        _draw_run(drawing, node, place, positions, (scale_x, scale_y, top), (colours, palette))
    drawing.height += math.ceil(deepest * scale_y)
    return drawing


def _draw_run(
    drawing: Drawing,
    node: Node,
    place: dict[int, float],
    positions: npt.NDArray[np.int64],
    scale: tuple[float, float, float],
    paint: tuple[npt.NDArray[np.int64], list[str]],
) -> None:
    """One bar; `place` has where the next run of each level begins."""
    level, run = len(node.last), node.run
    x = place[level - 1] if level - 1 in place and level not in place else place.get(level, MARGIN)
    scale_x, scale_y, top = scale
    colours, palette = paint
    first = int(run.blocks[0])
    wide = max(1.0, run.total * scale_x - 1)
    high = max(1.0, min(len(run.blocks), 100_000) * scale_y - 1)
    y = top + min(int(positions[first]), 100_000) * scale_y
    drawing.rects.append((x, y, wide, high, palette[int(colours[first])]))
    for deeper in [key for key in place if key > level]:
        del place[deeper]
    place[level] = x + run.total * scale_x
    place[level + 1] = x
