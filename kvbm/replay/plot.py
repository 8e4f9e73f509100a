# SPDX-License-Identifier: Apache-2.0
"""Hit rate against capacity, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from kvbm.replay.report import Comparison


def plot(title: str, comparisons: list[Comparison], block_bytes: int | None, path: Path) -> None:
    """Draw the curves; the ending of the path says as what (svg, png, pdf).

    Parameters
    ----------
    title : str
        Of the picture.
    comparisons : list of Comparison
        A point on each curve.
    block_bytes : int or None
        Size of a block over all ranks, for an axis in GB; None leaves it in blocks.
    path : Path
        File to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    unit = 1.0 if block_bytes is None else block_bytes / 1e9
    sizes = [c.outcome.capacity * unit for c in comparisons]
    curves = {"kvbm": [100 * c.outcome.hit_rate for c in comparisons]}
    for name in comparisons[0].others:
        curves[name] = [100 * c.others[name] / c.outcome.references for c in comparisons]
    for name, rates in curves.items():
        own = name == "kvbm"
        axes.plot(
            sizes, rates, label=name, linewidth=2.5 if own else 1.2, marker="o" if own else ""
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity, blocks" if block_bytes is None else "capacity, GB over all ranks")
    axes.set_ylabel("hit rate, % of block references")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
