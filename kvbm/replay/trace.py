# SPDX-License-Identifier: Apache-2.0
"""Request traces, in Mooncake's format or as `kvbm.leader.recorder` has written them.

Mooncake's: one JSON object a line and request: ``timestamp`` (ms), ``input_length`` and
``output_length`` (tokens), ``hash_ids`` (an id a block of the prompt; equal ids mean equal prefixes
up to and including that block). From the FAST'25 release of https://github.com/kvcache-ai/Mooncake.

A record's blocks have their sequence hashes as ids, and those of the answer are known, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from kvbm.errors import TraceError
from kvbm.leader.recorder import FORMAT


class Request(NamedTuple):
    """One request of a trace.

    Attributes
    ----------
    timestamp_ms : int
        When it arrives, from the start of the trace; never before the request ahead of it.
    input_tokens, output_tokens : int
        Lengths of prompt and answer.
    blocks : list of int
        Ids of the prompt's blocks, from the first on.
    generated : tuple of int
        Those of the answer's blocks, after them.
    """

    timestamp_ms: int
    input_tokens: int
    output_tokens: int
    blocks: list[int]
    generated: tuple[int, ...] = ()

    @property
    def chain(self) -> list[int]:
        """All blocks that there are when it ends: the prompt's, then the answer's."""
        return [*self.blocks, *self.generated]


class Trace(NamedTuple):
    """Requests in the order of arrival.

    Attributes
    ----------
    name : str
        Where they come from.
    requests : list of Request
        At least one.
    block_tokens : int
        Tokens of a block.
    """

    name: str
    requests: list[Request]
    block_tokens: int

    @property
    def references(self) -> int:
        """Blocks that are asked for, over all requests."""
        return sum(len(request.blocks) for request in self.requests)

    @property
    def distinct(self) -> int:
        """Blocks that differ: what an unbounded cache would hold at the end."""
        return len({block for r in self.requests for block in r.chain})


BLOCK_TOKENS = 512
"""Of Mooncake's traces; the format does not say."""

FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _request(line: str) -> Request:
    """Read one line; the ValueError says what is wrong in it."""
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("an object is needed")
    missing = [field for field in FIELDS if field not in entry]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    timestamp, *lengths, blocks = (entry[field] for field in FIELDS)
    for field, value in zip(FIELDS, (timestamp, *lengths), strict=False):
        if not _is_count(value):
            raise ValueError(f"{field}={value!r}: an integer of 0 or more is needed")
    if not isinstance(blocks, list) or not all(_is_count(block) for block in blocks):
        raise ValueError("hash_ids: a list of integers of 0 or more is needed")
    return Request(timestamp, lengths[0], lengths[1], blocks)


def _mooncake(lines: Iterable[str], name: str) -> Trace:
    requests: list[Request] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _request(line)
            if requests and request.timestamp_ms < requests[-1].timestamp_ms:
                raise ValueError(
                    f"timestamp={request.timestamp_ms} is before the one ahead of it "
                    f"({requests[-1].timestamp_ms})"
                )
        except ValueError as error:
            raise TraceError(f"{name}, line {number}: {error}") from None
        requests.append(request)
    return Trace(name, requests, BLOCK_TOKENS)


def _recorded(first: dict[str, Any], lines: Iterable[str], name: str) -> Trace:
    """Read a record; its last line may be torn, since the engine may have been killed."""
    if first.get("format") != FORMAT:
        raise TraceError(
            f"{name} is a record of format {first.get('format')}; this version reads {FORMAT}"
        )
    tokens = int(first["block_tokens"])
    requests: list[Request] = []
    running: dict[str, int] = {}
    torn = 0
    for number, line in enumerate(lines, 2):
        if torn:
            raise TraceError(f"{name}, line {torn}: not an event, and not the last line")
        try:
            entry = json.loads(line)
            if entry["event"] == "request":
                running[entry["request"]] = len(requests)
                blocks = entry["blocks"]
                requests.append(Request(int(entry["t_ms"]), len(blocks) * tokens, 0, blocks))
            elif entry["event"] == "finish" and entry["request"] in running:
                index = running.pop(entry["request"])
                request = requests[index]
                generated = tuple(entry["blocks"][len(request.blocks) :])
                requests[index] = request._replace(
                    output_tokens=len(generated) * tokens, generated=generated
                )
        except (ValueError, KeyError, TypeError):
            torn = number
    return Trace(name, requests, tokens)


def parse(lines: Iterable[str], name: str) -> Trace:
    """Read a trace or a record from its lines.

    Raises
    ------
    TraceError
        Names the first line that is not a request, or not in the order of time.
    """
    lines = iter(lines)
    first = next(lines, "")
    try:
        begin = json.loads(first)
    except ValueError:
        begin = None
    if isinstance(begin, dict) and begin.get("event") == "begin":
        trace = _recorded(begin, lines, name)
    else:
        trace = _mooncake(chain([first], lines), name)
    if not trace.requests:
        raise TraceError(f"{name} has no request")
    return trace


def read(path: Path) -> Trace:
    """Read a trace from a file.

    Raises
    ------
    TraceError
        The file cannot be read or is not a trace.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return parse(lines, path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from None


def lines(trace: Trace) -> Iterator[str]:
    """Write a trace in Mooncake's format."""
    for request in trace.requests:
        yield json.dumps(dict(zip(FIELDS, request, strict=False))) + "\n"
