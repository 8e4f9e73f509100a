# SPDX-License-Identifier: Apache-2.0
"""The tree of errors: what they inherit from, their facts, their texts, and that they travel."""

import copy
import inspect
import pickle

import pytest

from kvbm import errors
from kvbm.errors import KvbmError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, KvbmError)]
PUBLIC = [getattr(errors, name) for name in errors.__all__]
SEGMENT = "/kvbm-chat"
EXAMPLES: list[tuple[KvbmError, dict[str, object], str]] = [
    (errors.KvbmError("text"), {}, "text"),
    (errors.ConfigError("A=1 is not valid"), {}, "A=1 is not valid"),
    (errors.GeometryError("shape (2, 3)"), {}, "shape (2, 3)"),
    (errors.InspectError("x is not a file"), {}, "x is not a file"),
    (
        errors.SlabError("/tmp/slab", "no room"),
        {"where": "/tmp/slab", "reason": "no room"},
        "disk tier: /tmp/slab cannot be used: no room",
    ),
    (
        errors.SegmentError(SEGMENT, "because"),
        {"name": SEGMENT, "detail": "because"},
        "shared-memory object /kvbm-chat cannot be used: because",
    ),
    (
        errors.SegmentNotFound(SEGMENT),
        {"name": SEGMENT, "detail": ""},
        "shared-memory object /kvbm-chat does not exist",
    ),
    (
        errors.SegmentExists(SEGMENT, "made by pid 7"),
        {"name": SEGMENT, "detail": "made by pid 7"},
        "shared-memory object /kvbm-chat exists already: made by pid 7",
    ),
    (
        errors.SegmentInUse(SEGMENT),
        {"name": SEGMENT},
        "shared-memory object /kvbm-chat is in use by a living process",
    ),
    (
        errors.SegmentAccessDenied(SEGMENT, "owner is uid 7"),
        {"name": SEGMENT},
        "shared-memory object /kvbm-chat may not be used by this process: owner is uid 7",
    ),
    (
        errors.SegmentCorrupt(SEGMENT, "size 12"),
        {"name": SEGMENT},
        "shared-memory object /kvbm-chat is corrupt: size 12",
    ),
    (
        errors.SegmentClosed(SEGMENT),
        {"name": SEGMENT},
        "shared-memory object /kvbm-chat is closed in this process",
    ),
    (
        errors.VersionMismatch(SEGMENT, 3, 4),
        {"name": SEGMENT, "found": 3, "expected": 4},
        "shared-memory object /kvbm-chat has format version 3, this process needs 4",
    ),
    (
        errors.FingerprintMismatch(SEGMENT, b"\x01\xab", b"\x02\xcd"),
        {"name": SEGMENT, "found": b"\x01\xab", "expected": b"\x02\xcd"},
        "shared-memory object /kvbm-chat has fingerprint 01ab, this process needs 02cd",
    ),
    (
        errors.TooManyLeaders(SEGMENT, 16),
        {"name": SEGMENT, "limit": 16},
        (
            "shared-memory object /kvbm-chat has no place for another leader: "
            "16 of 16 leaders are attached"
        ),
    ),
    (errors.BlockError("text"), {}, "text"),
    (
        errors.NotEnoughBlocks(requested=5, available=2),
        {"requested": 5, "available": 2},
        "5 blocks requested, 2 available",
    ),
    (
        errors.BlockStateError(7, "Partial", "Complete"),
        {"block": 7, "found": "Partial", "expected": "Complete"},
        "block 7 is Partial, needed is Complete",
    ),
    (
        errors.TokenBlockError("full", "block 3 has 16 tokens"),
        {"kind": "full", "message": "block 3 has 16 tokens"},
        "block 3 has 16 tokens",
    ),
    (
        errors.ResetError(total=8, available=5),
        {"total": 8, "available": 5},
        "blocks are in use: total blocks: 8, available blocks: 5",
    ),
    (
        errors.UnsupportedCacheLevel("G4", "allowed is G2"),
        {"level": "G4", "why": "allowed is G2"},
        "cache level 'G4': allowed is G2",
    ),
    (errors.TransferError("rank 1: text"), {}, "rank 1: text"),
    (
        errors.LeaderTimeout(30, [1, 3], 4),
        {"timeout_secs": 30, "missing_ranks": (1, 3), "world_size": 4},
        (
            "2 of 4 workers did not announce themselves within "
            "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS=30 (ranks 1, 3): "
            "look for their errors above, or allow more seconds"
        ),
    ),
    (errors.TraceError("trace.jsonl, line 2: text"), {}, "trace.jsonl, line 2: text"),
]
IDS = [type(error).__name__ for error, _, _ in EXAMPLES]


def test_every_public_error_has_an_example_here() -> None:
    assert {type(error) for error, _, _ in EXAMPLES} == set(PUBLIC)


def test_every_error_of_the_module_is_public_or_marked_private() -> None:
    assert {c for c in CLASSES if not c.__name__.startswith("_")} == set(PUBLIC)


def test_every_error_says_what_it_is_for() -> None:
    for cls in PUBLIC:
        assert cls.__dict__["__doc__"], cls


def test_the_tree_in_the_documentation_is_the_real_one() -> None:
    doc = inspect.getdoc(errors)
    assert doc is not None
    stack: list[type] = []
    listed = []
    for line in doc.partition("The tree::\n\n")[2].splitlines():
        cls = getattr(errors, line.split()[0])
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        del stack[depth:]
        assert all(issubclass(cls, parent) for parent in stack), line
        builtin = {b.__name__ for b in cls.__mro__ if b in (ValueError, TimeoutError)}
        assert builtin == set(line.partition("(")[2].rstrip(")").split()), line
        stack.append(cls)
        listed.append(cls)
    assert len(listed) == len(PUBLIC)
    assert set(listed) == set(PUBLIC)


@pytest.mark.parametrize(("error", "facts", "text"), EXAMPLES, ids=IDS)
def test_an_error_has_its_facts_and_a_text(
    error: KvbmError, facts: dict[str, object], text: str
) -> None:
    assert {name: getattr(error, name) for name in facts} == facts
    assert str(error) == text


@pytest.mark.parametrize(("error", "facts", "text"), EXAMPLES, ids=IDS)
def test_an_error_survives_pickling_and_copying(
    error: KvbmError, facts: dict[str, object], text: str
) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert {name: getattr(twin, name) for name in facts} == facts
        assert str(twin) == text


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.GeometryError, ValueError),
        (errors.LeaderTimeout, TimeoutError),
        (errors.TraceError, ValueError),
    ],
)
def test_an_error_is_caught_under_the_built_in_name(
    cls: type[KvbmError], builtin: type[Exception]
) -> None:
    assert issubclass(cls, builtin)
