# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m kvbm.inspect``.

Exit status: 0, 1 where `verify` has found a violation or `gc` could not remove something, 2 where
what was asked for cannot be read or is not understood.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click

from kvbm._fast import contract
from kvbm._fast.objects import SHARED_MEMORY
from kvbm.errors import InspectError
from kvbm.inspect import changes, detail, gc, picture, report, text, tree
from kvbm.inspect.capture import Capture, capture, resolve, write_snapshot
from kvbm.inspect.decode import Segment
from kvbm.inspect.slab import find_slabs
from kvbm.inspect.slab_segment import decoded
from kvbm.inspect.verify import verify as verify_source
from kvbm.instance import instances

Row = dict[str, Any]
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

source_argument = click.argument("source", required=False)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
tier_option = click.option(
    "--tier", type=click.Choice([*contract.TIERS.values()]), help="The blocks of this tier."
)
limit_option = click.option("--limit", type=click.IntRange(0), help="Print at most this many.")


@click.group(context_settings=SETTINGS)
def main() -> None:
    """Look at a kvbm instance from outside: live, after a crash, or in a file.

    SOURCE is the name of an instance, a file made by `snapshot`, a plain copy of a segment
    (cp /dev/shm/kvbm-NAME FILE), or a slab of the disk tier, which outlives a reboot. Slabs are
    looked for in DYN_KVBM_DISK_CACHE_DIR. Without SOURCE, the only instance on this host is meant.
    Nothing is attached, locked or written; `gc` alone removes something.
    """


def command(name: str) -> Callable[[Callable[..., int | None]], click.Command]:
    """Make a command whose errors are a line on standard error and the exit status 2."""

    def make(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> None:
            try:
                status = function(*arguments, **options)
            except InspectError as error:
                click.echo(f"kvbm.inspect: {error}", err=True)
                sys.exit(2)
            sys.exit(status or 0)

        return main.command(name, context_settings=SETTINGS)(run)

    return make


def opened(source: str | None, slot_headers: bool = False, slabs: bool | None = None) -> Segment:
    """Capture and decode; what cannot be decoded is told on standard error."""
    return decoded(capture(resolve(source), slot_headers, slabs))


def live_name(source: str | None) -> str:
    """Name of a live instance; a file cannot be followed."""
    name = resolve(source)
    if name not in instances():
        raise InspectError(f"{name} is a file; top and serve follow a live instance")
    return name


def tell_damage(segment: Segment) -> None:
    """Say on standard error what could not be decoded."""
    for problem in segment.damage + ([] if segment.disk is None else segment.disk.damage):
        click.echo(f"kvbm.inspect: damaged: {problem}", err=True)


def print_lines(lines: Iterable[str]) -> None:
    """Print as they come."""
    write = sys.stdout.write
    for line in lines:
        write(line + "\n")


def print_document(what: str, body: Row) -> None:
    """Print one JSON document."""
    print(json.dumps({"schema": report.SCHEMA, "command": what, **body}, indent=1))


def print_rows(what: str, segment: Segment, rows: Iterable[Row], as_json: bool, **more: Any) -> int:
    """Print rows: as a JSON document whose list is written as it comes, or as a table."""
    if not as_json:
        print_lines(text.table(COLUMNS[what], rows))
        tell_damage(segment)
        return 0
    write = sys.stdout.write
    head = {"schema": report.SCHEMA, "command": what, "source": segment.capture.source, **more}
    write(json.dumps(head)[:-1] + f', "{what}": [')
    for number, row in enumerate(rows):
        write(("," if number else "") + "\n " + json.dumps(row))
    write(f'],\n "damage": {json.dumps(segment.damage)}}}\n')
    return 0


COLUMNS = {
    "blocks": text.BLOCK_COLUMNS,
    "ops": text.OPERATION_COLUMNS,
    "participants": text.PARTICIPANT_COLUMNS,
}


# ---- the whole -----------------------------------------------------------------------------------
def _instance_row(instance: str) -> Row:
    """One line of `list`, whatever state the instance is in."""
    row: Row = {
        "instance": instance,
        "owner": None,
        "leaders": None,
        "workers": None,
        "pools": None,
        "age_seconds": None,
        "fingerprint": None,
        "problem": None,
    }
    row["bytes"] = sum(_object_bytes(name) for name in instances().get(instance, []))
    row["slab_bytes"] = sum(_size_of(path) for path in find_slabs().get(instance, {}).values())
    try:
        found = report.summary(decoded(capture(instance)))
    except InspectError as error:
        return row | {"state": "no segment", "problem": str(error).removeprefix(f"{instance} ")}
    names = ("state", "owner", "leaders", "workers", "pools", "age_seconds", "fingerprint")
    row |= {name: found[name] for name in names}
    return row | {"problem": "; ".join(found["damage"]) or None}


def _object_bytes(name: str) -> int:
    return _size_of(SHARED_MEMORY / name.lstrip("/"))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@command("list")
@json_option
def list_instances(as_json: bool) -> None:
    """Instances on this host: owner, state, tiers, size, age, fingerprint.

    A state is one of: "in use"; "idle" (nobody attached, nothing left over); "dead" (what died in
    it has not been recovered yet); "damaged"; "no segment" (arenas alone); "on disk" (slabs alone).
    """
    there = instances()
    rows = [_instance_row(name) for name in [*there, *(n for n in find_slabs() if n not in there)]]
    if as_json:
        print_document("list", {"instances": rows})
        return
    print_lines(text.table(text.INSTANCE_COLUMNS, rows))
    for row in rows:
        if row["problem"]:
            click.echo(f"kvbm.inspect: {row['instance']}: {row['problem']}", err=True)


@command("show")
@source_argument
@json_option
def show(source: str | None, as_json: bool) -> None:
    """Summary: sizes, fill, states, participants, counters."""
    found = report.summary(opened(source, slabs=True))
    if as_json:
        print_document("show", found)
    else:
        print_lines(text.summary_lines(found))


@command("verify")
@source_argument
@json_option
@click.option("--arenas/--no-arenas", default=True, help="Compare with the slots' headers too.")
def verify(source: str | None, as_json: bool, arenas: bool) -> int:
    """Check every invariant of docs/protocol.md; the exit status is 1 if one does not hold.

    A live segment is read again where something seems wrong: what was a step in between is none.
    """
    segment, verdict = verify_source(resolve(source), arenas)
    broken = bool(verdict.violations)
    if as_json:
        found = [{"rule": v.rule, "text": v.text} for v in verdict.violations]
        body = {"source": segment.capture.source, "holds": not broken, "violations": found}
        print_document(
            "verify", {**body, "checked": verdict.checked, "unchecked": verdict.unchecked}
        )
        return int(broken)
    print_lines(f"violated     {v.rule}: {v.text}" for v in verdict.violations)
    print_lines(f"not checked  {problem}" for problem in verdict.unchecked)
    print_lines([f"checked      {', '.join(verdict.checked) or 'nothing'}"])
    count = len(verdict.violations)
    print_lines([f"{count} violations" if broken else "everything that was checked holds"])
    return int(broken)


@command("top")
@source_argument
@click.option("--hertz", type=click.FloatRange(0.1, 30), default=10.0, show_default=True)
@click.option("--seconds", type=click.FloatRange(0), help="End after this time.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON document a picture, a line each."
)
def top(source: str | None, hertz: float, seconds: float | None, as_json: bool) -> None:
    """Live view in the terminal: fill, hit rates, transfers, participants, shared prefixes.

    Block states, pins and prefixes are those of the last sweep over the table, which takes a second
    for each 40,000 blocks; everything else is of the moment.
    """
    from kvbm.inspect.top import run, run_json

    (run_json if as_json else run)(live_name(source), hertz, seconds)


@command("serve")
@click.argument("source", required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=6881, show_default=True)
@click.option("--address", default="127.0.0.1", show_default=True, help="Who can reach the page.")
@click.option("--json", "as_json", is_flag=True, help="Print the page's address as JSON.")
def serve(source: str | None, port: int, address: str, as_json: bool) -> None:
    """The live view as a web page with charts, of SOURCE or of all instances; Ctrl-C ends it.

    Only this host can reach it unless another --address is given; whoever can reach it sees names
    and numbers, never tokens or KV bytes.
    """
    from kvbm.inspect.serve import run

    def listening(url: str) -> None:
        if as_json:
            print_document("serve", {"url": url})
        else:
            print(f"{url}  (Ctrl-C ends it)")
        sys.stdout.flush()

    chosen = None if source is None else live_name(source)
    run(instances if chosen is None else lambda: [chosen], port, address, listening)


# ---- lists ---------------------------------------------------------------------------------------
@command("blocks")
@source_argument
@click.option("--state", type=click.Choice([*contract.BLOCK_STATES.values()]))
@tier_option
@click.option("--held/--not-held", default=None, help="Held by any leader, or by none.")
@click.option("--holder", type=click.IntRange(0, contract.LEADERS - 1), help="Held by this leader.")
@click.option("--group", type=click.IntRange(0), help="Of this KV-cache group.")
@click.option("--parent", type=click.IntRange(0), help="Children of this block.")
@click.option("--position", type=click.IntRange(0), help="At this depth; 0 are the roots.")
@click.option("--older", type=float, metavar="SECONDS", help="Registered at least so long ago.")
@click.option("--younger", type=float, metavar="SECONDS", help="Registered after that.")
@click.option("--sort", type=click.Choice(report.SORTS), default="block", show_default=True)
@click.option("--reverse", "descending", is_flag=True, help="The largest first.")
@limit_option
@json_option
def blocks(source: str | None, limit: int | None, as_json: bool, **wanted: Any) -> int:
    """Blocks in use, or those of a state, one a line: of the host tier, or with --tier disk."""
    segment = opened(source).of_tier(wanted["tier"])
    chosen = report.select_blocks(segment, report.Filter(**wanted))
    rows = report.block_rows(segment, chosen if limit is None else chosen[:limit])
    return print_rows("blocks", segment, rows, as_json, total=len(chosen))


@command("ops")
@source_argument
@click.option("--state", type=click.Choice([*contract.OPERATION_STATES.values()]))
@click.option("--kind", type=click.Choice([*contract.OPERATION_KINDS.values()]))
@click.option("--leader", type=click.IntRange(0, contract.LEADERS - 1))
@click.option("--rows", is_flag=True, help="In JSON: with the rows (device block, slot, block).")
@limit_option
@json_option
def ops(source: str | None, limit: int | None, as_json: bool, **wanted: Any) -> int:
    """Operations in flight: what is copied, for how long already, and how far each rank is."""
    segment = opened(source)
    rows = report.operation_rows(segment, report.Operations(**wanted))
    return print_rows("ops", segment, islice(rows, limit), as_json)


@command("participants")
@source_argument
@click.option("--role", type=click.Choice([*contract.ROLES.values()]))
@click.option("--alive/--dead", default=None)
@click.option("--leader", type=click.IntRange(0, contract.LEADERS - 1), help="It and its workers.")
@tier_option
@limit_option
@json_option
def participants(
    source: str | None, tier: str | None, limit: int | None, as_json: bool, **wanted: Any
) -> int:
    """Leaders and workers: pid, alive or dead, blocks held, operations not begun.

    With --tier disk: the leaders, as they are attached to the disk tier's table.
    """
    segment = opened(source).of_tier(tier)
    rows = report.participant_rows(segment, report.Lines(**wanted))
    return print_rows("participants", segment, islice(rows, limit), as_json)


@command("block")
@click.argument("reference")
@source_argument
@json_option
def block(reference: str, source: str | None, as_json: bool) -> None:
    """Everything about one block.

    REFERENCE is a slot of the host tier (17), the begin of a digest (8f3a), or block:N, slot:N,
    disk:N, digest:HEX. A digest is looked for in all tiers.
    """
    segment = opened(source, slot_headers=True)
    found = [detail.detail(table, number) for table, number in detail.find(segment, reference)[:16]]
    if as_json:
        body = {"source": segment.capture.source, "blocks": found, "damage": segment.damage}
        print_document("block", body)
        return
    for number, row in enumerate(found):
        print_lines([""] if number else [])
        print_lines(text.detail_lines(row))
    tell_damage(segment)


@command("tree")
@source_argument
@click.option("--depth", type=click.IntRange(1), help="Levels of branches to show.")
@click.option("--least", type=click.IntRange(1), default=1, help="Smallest subtree, in blocks.")
@click.option("--group", type=click.IntRange(0), help="Of this KV-cache group.")
@tier_option
@limit_option
@json_option
def tree_command(source: str | None, limit: int | None, as_json: bool, **wanted: Any) -> None:
    """The radix tree: chains of blocks with one child each are one line, largest first."""
    segment = opened(source).of_tier(wanted["tier"])
    whole = tree.tree_of(segment, wanted["group"])
    found = islice(tree.nodes(whole, wanted["depth"], wanted["least"]), limit)
    if as_json:
        rows = [tree.node_row(segment, node) for node in found]
        body = {"source": segment.capture.source, **tree.summary(whole), "runs": rows}
        print_document("tree", {**body, "damage": segment.damage})
        return
    print_lines(_tree_lines(segment, whole, found))
    tell_damage(segment)


def _tree_lines(segment: Segment, whole: tree.Tree, found: Iterator[tree.Node]) -> Iterator[str]:
    numbers = tree.summary(whole)
    yield f"{numbers['blocks']} blocks below {numbers['roots']} roots"
    if whole.unreachable:
        yield f"{whole.unreachable} blocks in a ring of parents: the segment is damaged"
    for node in found:
        row = tree.node_row(segment, node)
        held = f", held by {text.numbers(row['held_by'])}" if row["held_by"] else ""
        filling = f", {row['partial']} being filled" if row["partial"] else ""
        orphan = ", its parent is gone" if row["orphan"] else ""
        below = f" of {row['total']}" if row["branches"] else ""
        yield (
            f"{tree.branch(node)}{row['digest'][:12]} {row['length']}{below} blocks from position "
            f"{row['position']}, slots {text.numbers(row['slots'])}{held}{filling}{orphan}, "
            f"{text.duration(row['age_seconds'])}"
        )


# ---- files ---------------------------------------------------------------------------------------
@command("snapshot")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@source_argument
@click.option("--arenas/--no-arenas", default=True, help="With the headers of the slots.")
@json_option
def snapshot(file: Path, source: str | None, arenas: bool, as_json: bool) -> None:
    """Write a snapshot to FILE: the block state, never KV bytes. All commands read it."""
    taken: Capture = capture(resolve(source), arenas)
    write_snapshot(taken, file)
    size = file.stat().st_size
    if as_json:
        print_document("snapshot", {"source": taken.source, "file": str(file), "bytes": size})
    else:
        click.echo(f"{file}: {text.size(size)}", err=True)


@command("diff")
@click.argument("old")
@click.argument("new")
@tier_option
@click.option("--limit", type=click.IntRange(0), default=20, show_default=True)
@json_option
def diff(old: str, new: str, tier: str | None, limit: int, as_json: bool) -> None:
    """What changed between two snapshots, or since a snapshot of a live instance."""
    found = changes.changes(opened(old).of_tier(tier), opened(new).of_tier(tier))
    if as_json:
        print_document("diff", {"old": old, "new": new, **found})
    else:
        print_lines(text.change_lines(found, limit))


@command("map")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@source_argument
@click.option("--what", type=click.Choice(["tiers", "tree"]), default="tiers", show_default=True)
@click.option("--by", type=click.Choice(picture.COLOURS), default="state", show_default=True)
@json_option
def draw_map(file: Path, source: str | None, what: str, by: str, as_json: bool) -> None:
    """Draw the tiers, one cell a slot, or the tree, to FILE: .png or .svg."""
    segment = opened(source)
    draw = picture.draw_tiers if what == "tiers" else picture.draw_tree
    picture.write(draw(segment, by), file)
    if as_json:
        body = {"source": segment.capture.source, "file": str(file), "what": what, "by": by}
        print_document("map", {**body, "damage": segment.damage})
        return
    tell_damage(segment)


# ---- removal -------------------------------------------------------------------------------------
@command("gc")
@click.argument("names", nargs=-1, metavar="[INSTANCE]...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def gc_command(names: tuple[str, ...], yes: bool, as_json: bool) -> int:
    """Remove what dead instances left in shared memory; asks first.

    Without names: private instances that nobody uses. A named instance is a warm cache for the next
    engine and goes only if it is named here; one that is in use never goes.
    """
    found = gc.leftovers([*names])
    if as_json and not yes:
        print_document("gc", {"found": [one._asdict() for one in found], "removed": []})
        return 0
    if not as_json:
        for one in found:
            print_lines([f"{one.instance}: {text.size(one.bytes)} in {len(one.objects)} objects"])
        if not found:
            print_lines(["nothing is left over"])
            return 0
        if not yes and not click.confirm(f"remove {len(found)} instances?"):
            return 0
    removed, kept = gc.remove(found)
    if as_json:
        body = {"found": [one._asdict() for one in found]}
        print_document("gc", {**body, "removed": [one.instance for one in removed]})
    else:
        print_lines([f"removed {len(removed)} instances"])
        print_lines(f"kept {one.instance}: somebody began to use it" for one in kept)
    return int(bool(kept))
