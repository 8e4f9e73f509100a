# SPDX-License-Identifier: Apache-2.0
"""What must be equal for cached KV bytes to be reusable, and its hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbm._fast.segment import FORMAT_VERSION

SHOWN_CHARACTERS = 48
"""Of a value, in a message about two fingerprints that differ."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class Fingerprint:
    """Named values that decide whether bytes may be reused.

    Attributes
    ----------
    values : mapping of str to str, int, or sequence of them
        For example model, dtype, block size, ranks, geometry of each rank.
    """

    values: Mapping[str, str | int | Sequence[str | int] | None]

    @cached_property
    def description(self) -> bytes:
        """The values as JSON with sorted keys; shown when two fingerprints differ."""
        return json.dumps(
            {"format": FORMAT_VERSION, **self.values}, sort_keys=True, separators=(",", ":")
        ).encode()

    @cached_property
    def digest(self) -> bytes:
        """32 bytes; BLAKE2b of the description."""
        return hashlib.blake2b(self.description, digest_size=32).digest()


def differences(found: bytes, wanted: bytes) -> tuple[str, str]:
    """Return what differs between two descriptions, and nothing else, for one line of a message.

    Parameters
    ----------
    found, wanted : bytes
        Descriptions. The one that was found may be anything.

    Returns
    -------
    tuple of str
        `name=value` of what differs, in the first and in the second.
    """
    theirs, ours = _values(found), _values(wanted)
    names = [n for n in sorted({*theirs, *ours}) if theirs.get(n, _NONE) != ours.get(n, _NONE)]
    if not names:  # cut off, or scribbled on
        return _shown(found.decode(errors="replace")), _shown(wanted.decode())
    return (
        ", ".join(f"{name}={_shown(theirs.get(name, _NONE))}" for name in names),
        ", ".join(f"{name}={_shown(ours.get(name, _NONE))}" for name in names),
    )


_NONE = "(none)"


def _values(description: bytes) -> dict[str, Any]:
    try:
        values = json.loads(description)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _shown(value: Any) -> str:
    """Text of a value, on one line and not too long."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def weights_version(model: str, revision: str | None) -> str:
    """Identify the weights behind a model name.

    For a folder: a hash over name, size and modification time of its weight files, so that weights
    that were replaced in place are other weights. For a name on a hub: the revision.
    """
    folder = Path(model)
    if not folder.is_dir():
        return revision or "default"
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()


def config_version(config: Mapping[str, Any] | None) -> str | None:
    """Identify what a model's configuration says.

    The weights do not make the KV alone: a rotary base or its scaling, which may be overridden at
    the start, change it as well. What starts with an underscore, and the version of the library
    that wrote the file, say nothing about the model.
    """
    if config is None:
        return None
    kept = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name != "transformers_version"
    }
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
