# SPDX-License-Identifier: Apache-2.0
"""Plain text for people: sizes, ages, tables with fixed columns, so that they can be streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


def size(count: int) -> str:
    """Bytes in the unit that gives two to four digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Seconds in the unit that fits; "-" if unknown."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def percent(part: float | None) -> str:
    """A share; "-" if there is none."""
    return "-" if part is None else f"{100 * part:.1f} %"


def numbers(values: Iterable[int]) -> str:
    """Numbers with runs drawn together: 1-3,7."""
    pieces: list[list[int]] = []
    for value in values:
        if pieces and value == pieces[-1][1] + 1:
            pieces[-1][1] = value
        else:
            pieces.append([value, value])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in pieces) or "-"


@dataclass(frozen=True)
class Column:
    """One column: its heading, its width, and what it shows of a row."""

    heading: str
    width: int
    show: Callable[[Row], object]
    left: bool = False

    def cell(self, value: object) -> str:
        """A value in this column's width; longer ones move the rest of their line."""
        text = "-" if value is None else str(value)
        return text.ljust(self.width) if self.left else text.rjust(self.width)


def table(columns: Iterable[Column], rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a table, as the rows come."""
    columns = list(columns)
    yield "  ".join(column.cell(column.heading) for column in columns).rstrip()
    for row in rows:
        yield "  ".join(column.cell(column.show(row)) for column in columns).rstrip()


def yes_no(value: bool | None) -> str:
    """Words for a truth that may be unknown."""
    return {True: "yes", False: "no", None: "?"}[value]


def placement(row: Row, tier: str = "host") -> str:
    """Slot of a block in a tier, with a mark while it is being filled."""
    found = row["placements"].get(tier)
    if found is None:
        return "-"
    return f"{found['slot']}" + ("" if found["state"] == "ready" else f" ({found['state']})")


BLOCK_COLUMNS = (
    Column("block", 9, lambda r: r["block"]),
    Column("state", 10, lambda r: r["state"], left=True),
    Column("digest", 16, lambda r: r["digest"][:16], left=True),
    Column("pos", 6, lambda r: r["position"]),
    Column("grp", 3, lambda r: r["group"]),
    Column("parent", 9, lambda r: r["parent"]),
    Column("children", 8, lambda r: r["children"]),
    Column("held by", 8, lambda r: numbers(r["holders"])),
    Column("host", 9, lambda r: placement(r, "host")),
    Column("disk", 9, lambda r: placement(r, "disk")),
    Column("age", 7, lambda r: duration(r["age_seconds"])),
    Column("uses", 6, lambda r: r["uses"]),
)

OPERATION_COLUMNS = (
    Column("leader", 6, lambda r: r["leader"]),
    Column("op", 3, lambda r: r["operation"]),
    Column("kind", 5, lambda r: r["kind"], left=True),
    Column("state", 9, lambda r: r["state"], left=True),
    Column("blocks", 6, lambda r: r["row_count"]),
    Column("step", 8, lambda r: r["step"]),
    Column("request", 16, lambda r: r["request"], left=True),
    Column("age", 7, lambda r: duration(r["age_seconds"])),
    Column("ranks", 5, lambda r: ",".join(r["ranks"]), left=True),
)

PARTICIPANT_COLUMNS = (
    Column("line", 4, lambda r: r["line"]),
    Column("role", 6, lambda r: r["role"], left=True),
    Column("leader", 6, lambda r: r["leader"]),
    Column("rank", 4, lambda r: r["rank"]),
    Column("pid", 8, lambda r: r["pid"]),
    Column("alive", 5, lambda r: yes_no(r["alive"])),
    Column("inside", 6, lambda r: yes_no(r["inside"])),
    Column("pins", 7, lambda r: r["pins"]),
    Column("queued", 6, lambda r: r["queued"]),
    Column("step", 8, lambda r: r["step_filled"]),
    Column("cpu", 7, lambda r: duration(r["cpu_seconds"])),
    Column("age", 7, lambda r: duration(r["age_seconds"])),
    Column("engine", 16, lambda r: r["engine"], left=True),
)

INSTANCE_COLUMNS = (
    Column("instance", 24, lambda r: r["instance"], left=True),
    Column("state", 8, lambda r: r["state"], left=True),
    Column("owner", 8, lambda r: r["owner"], left=True),
    Column("leaders", 7, lambda r: r["leaders"]),
    Column("workers", 7, lambda r: r["workers"]),
    Column("host used", 17, lambda r: _fill(r, "host")),
    Column("disk used", 17, lambda r: _fill(r, "disk")),
    Column("size", 10, lambda r: size(r["bytes"])),
    Column("slabs", 10, lambda r: size(r["slab_bytes"]) if r["slab_bytes"] else None),
    Column("age", 7, lambda r: duration(r["age_seconds"])),
    Column("fingerprint", 11, lambda r: (r["fingerprint"] or "-")[:8], left=True),
)


def _fill(row: Row, tier: str) -> str:
    pool = (row["pools"] or {}).get(tier)
    return "-" if not pool or not pool["total"] else f"{pool['used']}/{pool['total']}"


def bar(part: float, width: int = 24) -> str:
    """A bar that is filled to a share between 0 and 1."""
    filled = round(max(0.0, min(1.0, part)) * width)
    return "█" * filled + "·" * (width - filled)


def summary_lines(row: Row) -> Iterator[str]:
    """The screen of `show`."""
    yield f"instance     {row['instance']} ({row['kind']}), {row['state']}"
    yield f"owner        {row['owner'] or '-'}, age {duration(row['age_seconds'])}"
    if row["kind"] != "slab":
        yield f"size         segment {size(row['bytes'])}, arenas {size(row['arena_bytes'])}"
    shape = row["shape"]
    if shape is not None:
        kind = "private" if shape["private_instance"] else "shared"
        yield (
            f"shape        {shape['ranks']} ranks, {shape['block_tokens']} tokens a block, {kind}"
        )
    for arena in row["arenas"]:
        if arena["bytes_per_block"] is None:
            yield f"arena        rank {arena['rank']}: its announcement is damaged"
            continue
        mark = "" if arena["belongs"] else ", of other content"
        yield (
            f"arena        rank {arena['rank']}: {size(arena['bytes_per_block'])} a block, "
            f"{arena['device_blocks']} device blocks{mark}"
        )
    yield f"fingerprint  {row['fingerprint']}"
    for name, value in sorted(row["description"].items()):
        yield f"  {name:<17} {value}"
    if row["kind"] == "slab":
        yield from _fill_lines(row["pools"])
    else:
        yield from _life_lines(row)
    if row["disk"] is not None:
        yield from _disk_lines(row["disk"])
    for slab in row["slabs"]:
        yield from _slab_lines(slab)
    yield from _device_lines(row["device"])
    for text in row["damage"]:
        yield f"damage       {text}"


def _life_lines(row: Row) -> Iterator[str]:
    """What a segment has and a slab has not: who is there, and what was counted."""
    yield (
        f"participants {row['leaders']} leaders, {row['workers']} workers, {row['dead']} dead"
        + (", recovering" if row["recovering"] else "")
    )
    yield from _fill_lines(row["pools"])
    yield f"blocks       {_counts(row['blocks'])}"
    operations = ", ".join(f"{count} {name}" for name, count in row["operations"].items())
    yield f"operations   {operations or 'none in flight'}"
    yield f"hit rate     {percent(row['hit_rate'])} of the blocks looked up"
    cpu = row["cpu_seconds"]
    yield (
        f"cpu time     {duration(cpu['leaders'])} in leaders' calls, "
        f"{duration(cpu['workers'])} in copies"
    )
    yield from latency_lines(row["latencies"])
    yield "counters"
    yield from _counter_lines(row["counters"])


def _fill_lines(pools: Row) -> Iterator[str]:
    for name, pool in pools.items():
        share = pool["used"] / pool["total"] if pool["total"] else 0.0
        yield f"{name:<12} {bar(share)} {pool['used']}/{pool['total']} ({percent(share)})"


def _counts(counts: Row) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def _counter_lines(counters: Row) -> Iterator[str]:
    for name, value in counters.items():
        if value:
            yield f"  {name:<22} {value}"


def _disk_lines(disk: Row) -> Iterator[str]:
    """The disk tier in the screen of `show`."""
    more = ", recovering" if disk["recovering"] else ""
    yield f"disk tier    {disk['state']}, age {duration(disk['age_seconds'])}{more}"
    yield f"  blocks     {_counts(disk['blocks'])}"
    yield "  counters   stored: from host to disk; loaded: from disk to host"
    yield from _counter_lines(disk["counters"])
    for slab in disk["slabs"]:
        yield from _slab_lines(slab)
    yield from _device_lines(disk["device"])
    for text in disk["damage"]:
        yield f"damage       {text}"


def _device_lines(device: Row | None) -> Iterator[str]:
    """The device of the slabs, its wear, and why that is not known."""
    if device is None:
        return
    if device["name"] is not None:
        written = device["written_bytes"]
        model = f" ({device['model']})" if device["model"] else ""
        since = "" if written is None else f", {size(written)} written since the machine started"
        yield f"device       {device['name']}{model}{since}"
    if device["wear"] is not None:
        yield (
            f"  wear       {percent(device['wear'])} of its life used, {percent(device['spare'])} "
            f"spare left, {size(device['lifetime_written_bytes'] or 0)} written in its life, "
            f"{device['media_errors']} media errors"
        )
    if device["problem"] is not None:
        yield f"  wear       not known: {device['problem']}"


def _slab_lines(slab: Row) -> Iterator[str]:
    """One slab, with what is to be known of its headers."""
    mark = "" if slab.get("belongs") is not False else ", of other content"
    yield f"slab         {slab['path']}: {size(slab['bytes'])}, rank {slab['rank']}{mark}"
    yield f"  headers    {_counts(slab['headers'])} of {slab['slots']}"
    yield f"  blocks     {size(slab['bytes_per_block'])} each" + (
        f", {slab['without_parent']} without their parent" if slab["without_parent"] else ""
    )
    if slab["fingerprint"] is not None:
        yield f"  made for   {slab['fingerprint']}, key epoch {slab['key_epoch']}"


def short_time(seconds: float | None) -> str:
    """A time between microseconds and minutes, in three digits; a dash if there is none."""
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def latency_lines(rows: list[Row]) -> Iterator[str]:
    """What transfers took so far, a line a kind."""
    if rows:
        yield f"{'transfers done':<16}{'count':>10}  {'p50':>8}  {'p99':>8}   copy p50  copy p99"
    for row in rows:
        times = [row[f"{what}_seconds"] for what in ("total_p50", "total_p99")]
        copies = [row[f"{what}_seconds"] for what in ("copy_p50", "copy_p99")]
        cells = "  ".join(f"{short_time(seconds):>8}" for seconds in times)
        yield f"  {row['kind']:<14}{row['count']:>10}  {cells}   " + "  ".join(
            f"{short_time(seconds):>8}" for seconds in copies
        )


def detail_lines(row: Row) -> Iterator[str]:
    """The screen of `block`."""
    where = " (disk tier)" if row["tier"] == "disk" else ""
    yield f"block        {row['block']}, {row['state']}, generation {row['generation']}{where}"
    yield f"digest       {row['digest']}"
    yield f"sequence     {row['sequence_hash']}"
    yield f"place        position {row['position']} of group {row['group']}"
    for tier, found in row["placements"].items():
        yield f"{tier:<12} slot {found['slot']}, {found['state']}, generation {found['generation']}"
    for header in row["slot_headers"]:
        yield (
            f"  rank {header['rank']}     {header['state']}, generation {header['generation']}, "
            f"digest {header['digest'][:16]}, {size(header['payload_bytes'])}, "
            f"checksum {header['checksum'] or 'none'}"
        )
    yield f"held by      leaders {numbers(row['holders'])}"
    yield (
        f"recency      priority {row['priority']}, tick {row['tick']}, "
        f"registered {duration(row['age_seconds'])} ago"
    )
    parents = " < ".join(
        f"{one['block']}" + ("" if one["as_named"] else " (not as named)") for one in row["chain"]
    )
    yield f"parents      {parents or 'none: a root'}"
    yield f"children     {row['children']} counted: {numbers(row['children_blocks'])}"
    places = ", ".join(f"bucket {e['bucket']} place {e['place']}" for e in row["index"]["entries"])
    yield f"index        {places or 'no entry'} (buckets {numbers(row['index']['buckets'])})"
    for operation in row["operations"]:
        yield (
            f"operation    {operation['operation']} of leader {operation['leader']}: "
            f"{operation['kind']}, {operation['state']}"
        )


def change_lines(row: Row, limit: int) -> Iterator[str]:
    """The screen of `diff`."""
    if not row["same_content"]:
        yield "not the same content: the segment was made anew between the two"
    yield f"time         {duration(row['seconds'])}"
    registered = row["registered"]
    yield f"registered   {registered['before']} -> {registered['after']}"
    for name, pool in row["pools"].items():
        yield f"{name:<12} {pool['before']} -> {pool['after']} used"
    for word, sign in (("came", "+"), ("went", "-")):
        yield f"{word:<12} {row[word]} blocks"
        for block in row[f"{word}_blocks"][:limit]:
            yield (
                f"  {sign} {block['digest'][:16]}  position {block['position']}, "
                f"slot {placement(block, *block['placements'])}"
            )
        more = row[word] - min(limit, len(row[f"{word}_blocks"]))
        if more > 0:
            yield f"  {sign} {more} more"
    for word, sign in (("participants_came", "+"), ("participants_went", "-")):
        for line in row[word]:
            yield f"{sign} {line['role']} on line {line['line']}, pid {line['pid']}"
    for name, value in row["counters"].items():
        yield f"  {name:<22} {value:+d}"
