# SPDX-License-Identifier: Apache-2.0
"""The exported contract is the one of layout.h: each field, its offset and size, each section."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from kvbm._fast import contract
from kvbm._fast.segment import segment_bytes, shape_for
from tests.fast.instances import Instance, digests
from tests.fast.raw_segment import RawSegment

HEADERS = [Path(contract.__file__).with_name(name) for name in ("counters.h", "layout.h")]
SIZES = {"kv_au64": 8, "uint64_t": 8, "kv_au32": 4, "uint32_t": 4, "uint8_t": 1}
NOT_READ = re.compile(r"(pad\d*|reserved)$")


def constants(text: str) -> dict[str, int]:
    """Values of the enumerators and of what they are made of."""
    found: dict[str, int] = {}
    for body in re.findall(r"enum(?: \w+)? \{(.*?)\}", text, re.DOTALL):
        for name, value in re.findall(r"(KV_\w+) = ([^,\n}]+)", body):
            found[name] = int(eval(value, {}, dict(found)))
    return found


def structs() -> dict[str, dict[str, tuple[int, int, int]]]:
    """Field to (offset, size, count) of the structs, by the rules of the C language."""
    text = "".join(header.read_text(encoding="utf-8") for header in HEADERS)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    known = constants(text)
    sizes, alignment = dict(SIZES), dict(SIZES)
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, re.DOTALL):
        if re.search(r"\*\w", body):
            break  # the picture of a process, which is not in the segment
        fields: dict[str, tuple[int, int, int]] = {}
        at, widest = 0, 1
        for kind, declared in re.findall(r"(\w+) ([^;]+);", body):
            for one in declared.split(","):
                match = re.fullmatch(r"\s*(\w+)(?:\[(.+)\])?\s*", one)
                assert match is not None, one
                count = int(eval(match[2], {}, known)) if match[2] else 1
                at = -(-at // alignment[kind]) * alignment[kind]
                fields[match[1]] = (at, sizes[kind], count)
                if kind == "kv_shape":
                    parts = {k: v for k, v in found[kind].items() if k}
                    for part, (offset, size, many) in parts.items():
                        fields[f"{match[1]}.{part}"] = (at + offset, size, many)
                at += sizes[kind] * count
                widest = max(widest, alignment[kind])
        sizes[name], alignment[name] = -(-at // widest) * widest, widest
        fields[""] = (0, sizes[name], 1)
        found[name] = fields
    return found


def test_each_field_is_exported_at_its_place() -> None:
    written = structs()
    for name, record in contract.RECORDS.items():
        fields = written[name]
        assert record.size == fields.pop("")[1], name
        exported = {field.name: field[1:] for field in record.fields}
        wanted = {
            field: place
            for field, place in fields.items()
            if not NOT_READ.search(field) and field != "shape"
        }
        assert exported == wanted, name


def test_the_sections_are_those_of_an_independent_reader(make_instance: object) -> None:
    one: Instance = make_instance(host_slots=200, ranks=3, disk_slots=70)  # type: ignore[operator]
    sections = contract.sections(one.shape)
    with RawSegment(one.name) as raw:
        names = {"pool.blocks": "pool 0", "pool.host": "pool 1", "pool.disk": "pool 2"}
        names |= {f"summary.{n}": f"summary {i}" for i, n in enumerate(("blocks", "host", "disk"))}
        for name, section in sections.items():
            if name not in ("header", "end"):
                assert section.offset == raw.at[names.get(name, name)], name
        assert sections["end"].offset == raw.total_bytes == segment_bytes(one.shape)
    fixed = contract.fixed_sections()
    assert all(sections[name] == section for name, section in fixed.items())


def test_an_impossible_shape_has_no_sections() -> None:
    shape = shape_for(64, 0, 1, 16, True)
    assert contract.sections(shape._replace(ranks=17)) == {}
    assert contract.sections(shape._replace(index_buckets=3)) == {}
    assert contract.sections(shape._replace(block_capacity=2**32 - 1)) == {}


@pytest.mark.parametrize("word", contract.BITS)
def test_the_parts_of_a_word_do_not_overlap(word: str) -> None:
    masks = list(contract.BITS[word].values())
    assert sum(masks) == np.bitwise_or.reduce(np.array(masks, np.uint64))
    for mask in masks:
        ones = mask // (mask & -mask)
        assert ones & (ones + 1) == 0  # one piece


def test_the_places_in_the_index_are_those_of_an_independent_reader(make_instance: object) -> None:
    one: Instance = make_instance(host_slots=500)  # type: ignore[operator]
    hashes = [digest[:16] for digest in digests(50)]
    halves = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
    low, high = np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])
    tag, first, second = (np.zeros(50, np.uint32) for _ in range(3))
    contract.index_places(low, high, one.shape.index_buckets, tag, first, second)
    with RawSegment(one.name) as raw:
        for number, digest in enumerate(hashes):
            assert raw.candidates(digest) == (tag[number], first[number], second[number])
    with pytest.raises(ValueError, match="differ in length"):
        contract.index_places(low, high[:-1], 8, tag, first, second)


def test_free_bits_are_counted() -> None:
    words = np.array([0, 1, 2**64 - 1, 0xF0F0], np.uint64)
    assert contract.free_count(words) == 1 + 64 + 8
