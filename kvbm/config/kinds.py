# SPDX-License-Identifier: Apache-2.0
"""What a tunable is, and the kinds of values: how a text is read, what is allowed, in words.

Each kind is a type for a field of `kvbm.config.Settings`. The words go into the table of
``docs/configuration.md`` and into error messages.
"""

import grp
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

from kvbm.log import parse_directives

UINT32_MAX = 2**32 - 1
TRUE_WORDS = frozenset({"1", "true", "on", "yes"})
FALSE_WORDS = frozenset({"0", "false", "off", "no"})


class Kind(NamedTuple):
    """What a tunable takes.

    Attributes
    ----------
    allowed
        The values, in words.
    empty_is_value
        Whether an empty text is a value; otherwise it means that the tunable is not set.
    """

    allowed: str
    empty_is_value: bool = False


class Status(str, Enum):
    """What it does to set a tunable."""

    SUPPORTED = "supported"
    UNNEEDED = "accepted, not needed"
    UNSUPPORTED = "not supported"


class Tunable(NamedTuple):
    """One row of the table of tunables: the facts of a field of `kvbm.config.Settings`."""

    field: str
    variable: str
    kind: Kind
    default: Any
    status: Status
    description: str

    @classmethod
    def of(cls, field: str, info: FieldInfo) -> "Tunable":
        """Row of a field made by `tunable_field`."""
        facts = info.json_schema_extra
        assert isinstance(facts, dict), field
        # A kind stands beside the type, or inside it where the field may be None as well.
        inside = (part for arg in get_args(info.annotation) for part in get_args(arg))
        return cls(
            field=field,
            variable=str(facts["variable"]),
            kind=next(part for part in (*info.metadata, *inside) if isinstance(part, Kind)),
            default=info.default,
            status=Status(facts["status"]),
            description=info.description or "",
        )


def tunable_field(status: Status, variable: str, default: object, description: str) -> Any:
    """Field of `kvbm.config.Settings`, with what `Tunable` shows of it."""
    facts: dict[str, Any] = {"variable": variable, "status": status.value}
    return Field(default, description=description, json_schema_extra=facts)


def is_truthy(text: str) -> bool:
    """Whether upstream takes `text` for yes: 1, true, on, yes in any case."""
    return text.strip().lower() in TRUE_WORDS


def _not_bool(value: object) -> object:
    # JSON's true would be the number 1.
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


def _truthy(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in TRUE_WORDS | FALSE_WORDS:
        return is_truthy(value)
    raise ValueError("neither yes nor no")


def _flag_set(value: object) -> bool:
    if isinstance(value, bool | str):
        return value is not False
    raise ValueError("neither a text nor true or false")


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _policy(value: object) -> object:
    word = _lower(value)
    return word if word in ("lru", "reuse") else value


def _unreserved(name: str) -> str:
    # These names are taken: <instance>.<tier>.<rank> by arenas, <instance>.disk by the disk
    # tier's segment, p-<hex> by private instances.
    if re.search(r"\.((host|disk)\.[0-9]+|disk)$", name) or re.fullmatch(r"p-[0-9a-f]{16}", name):
        raise ValueError("reserved")
    return name


def _group_id(value: object) -> object:
    if not isinstance(value, str) or value.strip().isdecimal():
        return _not_bool(value)
    try:
        return grp.getgrnam(value.strip()).gr_gid
    except KeyError:
        raise ValueError("no such group") from None


def _directives(text: str) -> str:
    parse_directives(text)
    return text


_NUMBER = BeforeValidator(_not_bool)

Gigabytes = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False),
    _NUMBER,
    Kind("decimal number >= 0, in GB (1e9 bytes)"),
]
PositiveGigabytes = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    _NUMBER,
    Kind("decimal number > 0, in GB (1e9 bytes)"),
]
# A slot index is 32 bits wide.
Blocks = Annotated[
    int, Field(ge=0, le=UINT32_MAX), _NUMBER, Kind(f"integer from 0 (off) to {UINT32_MAX}")
]
Uint32 = Annotated[int, Field(ge=0, le=UINT32_MAX), _NUMBER, Kind(f"integer, 0 to {UINT32_MAX}")]
Count = Annotated[int, Field(ge=1), _NUMBER, Kind("integer >= 1")]
Seconds = Annotated[int, Field(ge=0), _NUMBER, Kind("integer >= 0, in seconds")]
PositiveSeconds = Annotated[int, Field(ge=1), _NUMBER, Kind("integer >= 1, in seconds")]
Port = Annotated[int, Field(ge=1, le=65535), _NUMBER, Kind("integer, 1 to 65535")]
Truthy = Annotated[
    bool,
    BeforeValidator(_truthy),
    Kind("1, true, on, yes; or 0, false, off, no"),
]
FlagSet = Annotated[
    bool,
    BeforeValidator(_flag_set),
    Kind("any text turns it on, even 0 or an empty one", empty_is_value=True),
]
Text = Annotated[str, Kind("text")]
Folder = Annotated[Path, Kind("path of a folder")]
File = Annotated[Path, Kind("path of a file")]
InstanceName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9._-]{1,64}$"),
    AfterValidator(_unreserved),
    Kind(
        "1 to 64 characters of A-Z a-z 0-9 . _ - (reserved: names that end like .host.0 or .disk, "
        "and p- with 16 hexadecimal digits)"
    ),
]
GroupId = Annotated[
    int,
    Field(ge=0, le=UINT32_MAX - 1),  # the highest number means "no group" to chown
    BeforeValidator(_group_id),
    Kind("name of an existing group, or a group id"),
]
LogDirectives = Annotated[
    str,
    AfterValidator(_directives),
    Kind("trace, debug, info, warn, error, off; or kvbm::module=level; separated by commas"),
]
AllocatorType = Annotated[Literal["default", "open-direct"], Kind("default, open-direct")]
LoadFailurePolicy = Annotated[
    Literal["recompute", "fail"], BeforeValidator(_lower), Kind("recompute, fail")
]
PolicyName = Annotated[
    str,
    Field(pattern=r"^(lru|reuse|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"),
    BeforeValidator(_policy),
    Kind("lru, reuse, or package.module:Class of your own"),
]
ConsolidatorMode = Annotated[
    Literal["dedup", "passthrough"], BeforeValidator(_lower), Kind("dedup, passthrough")
]
