# SPDX-License-Identifier: Apache-2.0
"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SHOWN_MAX = 20
"""Violations of one sort that are told apart; the rest is a number."""


class Violation(NamedTuple):
    """One broken rule.

    Attributes
    ----------
    rule : str
        Its name in docs/protocol.md.
    text : str
        What is wrong, and where.
    key : str
        Equal for the same violation in two readings.
    """

    rule: str
    text: str
    key: str


def listed(
    rule: str,
    wrong: npt.NDArray[np.bool_],
    tell: Callable[[Any], str],
    words: npt.NDArray[Any] | None = None,
) -> Iterator[Violation]:
    """A violation for each place that is marked; beyond `SHOWN_MAX`, one with their number.

    `words` are what moves when the place does, a block's word with its generation: where a later
    reading finds another one, it is not the same violation.
    """

    def key(place: int, text: str) -> str:
        return f"{rule}: {text}" if words is None else f"{rule}: {text} ({words[place]:#x})"

    places = np.flatnonzero(wrong)
    for place in places[:SHOWN_MAX]:
        text = tell(int(place))
        yield Violation(rule, text, key(place, text))
    if len(places) > SHOWN_MAX:
        first = tell(int(places[SHOWN_MAX]))
        more = f"{len(places) - SHOWN_MAX} more, the first: {first}"
        yield Violation(rule, more, key(places[SHOWN_MAX], f"more like {first}"))
