# SPDX-License-Identifier: Apache-2.0
"""Reading the settings: extra config, else environment, else default; and telling what is wrong."""

import difflib
import fnmatch
import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from kvbm import log
from kvbm.config.kinds import Status, Tunable
from kvbm.config.settings import Settings, tunables
from kvbm.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "DYN_KVBM_"

# Names that upstream documents or mentions but does not read, and what to do instead.
NOT_READ = {
    "DYN_KVBM_TRANSFER_BATCH_SIZE": "upstream reads DYN_KVBM_MAX_TRANSFER_BATCH_SIZE",
    "DYN_KVBM_ENABLE": "to turn kvbm off, configure no connector",
    "DYN_KVBM_DEVICE_LAYOUT_TYPE": "the layout is taken from the engine's tensors",
    "DYN_KVBM_NIXL_BACKEND_*": "the disk tier can use POSIX, GDS and GDS_MT",
    "DYN_KVBM_OBJECT_*": "there is no object tier",
}
# Keys of kv_connector_extra_config, or of a whole vLLM KVTransferConfig, that are not for kvbm.
FOREIGN_KEYS = frozenset(
    {
        "connectors",
        "enable_permute_local_kv",
        "engine_id",
        "kv_buffer_device",
        "kv_connector",
        "kv_connector_extra_config",
        "kv_connector_module_path",
        "kv_ip",
        "kv_load_failure_policy",
        "kv_parallel_size",
        "kv_port",
        "kv_rank",
        "kv_role",
    }
)


class _Given(NamedTuple):
    """A value as somebody gave it, and where."""

    label: str
    value: object

    def __str__(self) -> str:
        return f"{self.label}={self.value!r}"


def load_settings(
    extra_config: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read and check all settings, and set the log levels that they ask for.

    Names and values that have no effect are logged, each once a process.

    Parameters
    ----------
    extra_config
        vLLM's ``kv_connector_extra_config``: field or variable names to values. None as a value
        means not set.
    environ
        Environment variables; `os.environ` if None.

    Returns
    -------
    Settings
        Extra config wins over the environment, the environment over the default.

    Raises
    ------
    ConfigError
        Values that are not allowed: all of them, each with where it stands and what is allowed.
    """
    environ = os.environ if environ is None else environ
    extra_config = {} if extra_config is None else extra_config
    if not isinstance(extra_config, Mapping):
        raise ConfigError(
            f"kv_connector_extra_config={extra_config!r} is not valid "
            "(allowed: a mapping of names to values)"
        )
    in_environ = _from_environ(environ)
    in_extra = _from_extra_config(extra_config)
    errors: list[str] = []
    low = _validated(in_environ, errors)
    high = _validated(in_extra, errors)
    settings = low.model_copy(update={f: getattr(high, f) for f in high.model_fields_set})
    log.configure(settings.log)
    _warn_unknown(environ, extra_config)
    if errors:
        raise ConfigError("; ".join(errors))
    for field in sorted(low.model_fields_set & high.model_fields_set):
        if getattr(low, field) != getattr(high, field):
            _warn_differs(used=in_extra[field], other=in_environ[field])
    _report_without_effect(settings, in_environ | in_extra)
    return settings


def _is_set(value: object, tunable: Tunable) -> bool:
    empty = isinstance(value, str) and not value.strip()
    return value is not None and (tunable.kind.empty_is_value or not empty)


def _from_environ(environ: Mapping[str, str]) -> dict[str, _Given]:
    """Values of known variables, by field."""
    return {
        t.field: _Given(t.variable, environ[t.variable])
        for t in tunables()
        if _is_set(environ.get(t.variable), t)
    }


def _from_extra_config(extra_config: Mapping[str, Any]) -> dict[str, _Given]:
    """Values of known keys, by field. Between its two names, that of the field wins."""
    given: dict[str, _Given] = {}
    for t in tunables():
        for key in (t.field, t.variable):
            value = extra_config.get(key)
            if not _is_set(value, t):
                continue
            here = _Given(f"kv_connector_extra_config[{key!r}]", value)
            first = given.setdefault(t.field, here)
            if first.value != here.value:
                _warn_differs(used=first, other=here)
    return given


def _validated(given: Mapping[str, _Given], errors: list[str]) -> Settings:
    """Settings with the given values; a text is added to `errors` for each that is not allowed."""
    try:
        return Settings.model_validate({field: g.value for field, g in given.items()})
    except ValidationError as error:
        kinds = {t.field: t.kind for t in tunables()}
        for field in dict.fromkeys(str(e["loc"][0]) for e in error.errors()):
            errors.append(f"{given[field]} is not valid (allowed: {kinds[field].allowed})")
        return Settings()


def _warn_unknown(environ: Mapping[str, str], extra_config: Mapping[str, Any]) -> None:
    """Warn about names that nobody reads, and name the nearest that is read."""
    variables = {t.variable for t in tunables()}
    for name in sorted({n for n in environ if n.startswith(PREFIX)} - variables):
        _warn_once(_unknown_text(name, name, variables))
    keys = variables | {t.field for t in tunables()}
    for key in sorted(extra_config.keys() - keys - FOREIGN_KEYS, key=str):
        label = f"kv_connector_extra_config[{key!r}]"
        _warn_once(_unknown_text(str(key), label, keys))


def _unknown_text(name: str, label: str, known: Iterable[str]) -> str:
    for pattern, advice in NOT_READ.items():
        if fnmatch.fnmatchcase(name, pattern):
            return f"{label} has no effect, neither here nor upstream: {advice}"
    # Compared without the common start, which would make everything look alike.
    bare = {n.removeprefix(PREFIX): n for n in sorted(known)}
    match = difflib.get_close_matches(name.removeprefix(PREFIX), bare, n=1)
    hint = f"; did you mean {bare[match[0]]}?" if match else ""
    return f"{label} is not a setting of kvbm and has no effect{hint}"


def _warn_differs(used: _Given, other: _Given) -> None:
    _warn_once(f"{used} is used; {other} differs and is ignored")


def _report_without_effect(settings: Settings, given: Mapping[str, _Given]) -> None:
    for tunable in tunables():
        if tunable.field not in given:
            continue
        shown = given[tunable.field]
        if tunable.status is Status.UNNEEDED:
            _log_once(logging.INFO, f"{shown} is accepted and not needed: {tunable.description}")
        elif (
            tunable.status is Status.UNSUPPORTED
            and getattr(settings, tunable.field) != tunable.default
        ):
            _warn_once(f"{shown} is not supported by this version and has no effect")


@functools.lru_cache(maxsize=1024)
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


def _warn_once(message: str) -> None:
    _log_once(logging.WARNING, message)
