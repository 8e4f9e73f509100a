# SPDX-License-Identifier: Apache-2.0
"""The table of tunables for the documentation, and ``python -m kvbm.config``."""

import argparse
import json
import sys
from pathlib import Path

from kvbm.config import load_settings, tunables
from kvbm.errors import ConfigError

TABLE_BEGIN = "<!-- begin of the table made by `python -m kvbm.config` -->\n"
TABLE_END = "<!-- end of the table -->\n"


def markdown_table() -> str:
    """Table of all tunables, one a line, in Markdown."""
    lines = ["| variable | value | default | | meaning |", "|---|---|---|---|---|"]
    for t in tunables():
        default = str(t.default).lower() if isinstance(t.default, bool) else t.default
        shown = "unset" if default is None else f"`{default}`"
        lines.append(
            f"| `{t.variable}` | {t.kind.allowed} | {shown} | {t.status.value} | {t.description} |"
        )
    return "\n".join(lines) + "\n"


def update_page(page: Path) -> None:
    """Put the table between the two marks in a page of documentation."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not (mark and end):
        raise ConfigError(f"{page} has no place for the table: {TABLE_BEGIN}...{TABLE_END}")
    page.write_text(before + mark + "\n" + markdown_table() + "\n" + end + after, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvbm.config", description="Settings of kvbm.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print the settings in effect here")
    what.add_argument("--update", metavar="PAGE", type=Path, help="put the table into PAGE")
    args = parser.parse_args(argv)
    try:
        if args.json:
            print(json.dumps(load_settings().model_dump(mode="json"), indent=2))
        elif args.update:
            update_page(args.update)
        else:
            print(markdown_table(), end="")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
