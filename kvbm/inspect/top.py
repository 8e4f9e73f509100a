# SPDX-License-Identifier: Apache-2.0
"""`top`: the live view in a terminal, or as JSON.

By curses, which is there where Python is, and which sends to the terminal only what has changed.
"""

from __future__ import annotations

import curses
import json
import sys
import time
from typing import Any

from kvbm.errors import InspectError
from kvbm.inspect.follow import Follower
from kvbm.inspect.frame import frame
from kvbm.inspect.report import SCHEMA
from kvbm.inspect.top_view import screen

ENDS = (ord("q"), ord("Q"), 27)


def run(instance: str, hertz: float, seconds: float | None) -> None:
    """Show an instance until somebody ends it.

    Parameters
    ----------
    instance : str
        Name of a live instance.
    hertz : float
        Pictures a second.
    seconds : float, optional
        End after this time.
    """
    if not sys.stdout.isatty():
        raise InspectError("top needs a terminal; --json does not")
    try:
        curses.wrapper(_loop, instance, 1 / hertz, seconds)
    except curses.error as error:
        raise InspectError(f"top needs a terminal: {error}") from None
    except KeyboardInterrupt:
        return


def run_json(instance: str, hertz: float, seconds: float | None) -> None:
    """Print what would be shown: one JSON document a picture, a line each, at least one."""
    end = None if seconds is None else time.monotonic() + seconds
    follower = Follower()
    try:
        while True:
            next_at = time.monotonic() + 1 / hertz
            picture = frame(*follower.look_with_disk(instance))
            print(json.dumps({"schema": SCHEMA, "command": "top", **picture}), flush=True)
            if end is not None and next_at > end:
                return
            time.sleep(max(0.0, next_at - time.monotonic()))
    except KeyboardInterrupt:
        return
    finally:
        follower.close()


def _loop(window: Any, instance: str, period: float, seconds: float | None) -> None:
    try:
        curses.curs_set(0)
    except curses.error:  # a terminal that cannot hide its cursor
        pass
    end = None if seconds is None else time.monotonic() + seconds
    shown: list[str] = []
    paused = False
    follower = Follower()
    try:
        while end is None or time.monotonic() < end:
            began = time.monotonic()
            picture = frame(*follower.look_with_disk(instance))
            if not paused:
                shown = _draw(window, screen(picture), shown)
            window.timeout(max(0, int(1000 * (period - (time.monotonic() - began)))))
            key = window.getch()
            if key in ENDS:
                return
            if key == ord(" "):
                paused = not paused
            elif key == curses.KEY_RESIZE:
                shown = []
                window.clear()
    finally:
        follower.close()


def fitted(lines: list[str], height: int) -> list[str]:
    """As many lines as there is room for; where some are left out, the last one says so."""
    if len(lines) <= height:
        return lines
    shown = max(0, height - 1)
    return [*lines[:shown], f"... {len(lines) - shown} more lines in a higher window"]


def _draw(window: Any, lines: list[str], shown: list[str]) -> list[str]:
    """Write the lines that differ from those that are shown."""
    height, width = window.getmaxyx()
    lines = [line[: width - 1] for line in fitted(lines, height)]
    for row in range(max(len(lines), min(len(shown), height))):
        line = lines[row] if row < len(lines) else ""
        if row >= len(shown) or shown[row] != line:
            window.addstr(row, 0, line)
            window.clrtoeol()
    window.refresh()
    return lines
