# SPDX-License-Identifier: Apache-2.0
"""Logging: standard library loggers named ``kvbm.*``, levels from ``DYN_LOG``.

Modules use ``logging.getLogger(__name__)``. Nothing is configured on import;
`kvbm.config.load_settings` calls `configure` in each process.

``DYN_LOG`` is upstream's: comma-separated directives as in Rust's ``tracing_subscriber``
``EnvFilter``: a level (``debug``) or ``target=level`` (``kvbm::worker=trace``; ``kvbm.worker``
means the same). Directives for other programs' targets are theirs and are passed over.
"""

import logging

__all__ = ["LEVELS", "TRACE", "configure", "parse_directives"]

ROOT = "kvbm"
TRACE = 5
OFF = logging.CRITICAL + 10
LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": OFF,
}


def parse_directives(text: str) -> dict[str, int]:
    """Levels of loggers that a ``DYN_LOG`` text asks for.

    Parameters
    ----------
    text
        E.g. ``"info"`` or ``"warn,kvbm::worker=debug,hyper=off"``.

    Returns
    -------
    dict
        Logger name to level, always with an entry for ``kvbm``.

    Raises
    ------
    ValueError
        A directive for ``kvbm`` names a level that does not exist.
    """
    general = logging.INFO
    levels = {}
    for directive in filter(None, (part.strip() for part in text.split(","))):
        target, equals, level = (part.strip() for part in directive.partition("="))
        if not equals and target.lower() in LEVELS:
            general = LEVELS[target.lower()]
            continue
        target = target.replace("::", ".")
        if target != ROOT and not target.startswith(ROOT + "."):
            continue
        level = level.lower() if equals else "trace"  # a lone target asks for everything of it
        if level not in LEVELS:
            raise ValueError(f"{directive!r}: the level must be one of {', '.join(LEVELS)}")
        levels[target] = LEVELS[level]
    return {ROOT: general, **levels}


def configure(text: str = "info") -> None:
    """Set the levels of the ``kvbm`` loggers; log to stderr if nobody handles their records.

    Engines set up handlers for their own loggers only, so without this the information lines
    would be lost. May be called again.

    Parameters
    ----------
    text
        Value of ``DYN_LOG``.
    """
    logging.addLevelName(TRACE, "TRACE")
    for name, level in parse_directives(text).items():
        logging.getLogger(name).setLevel(level)
    root = logging.getLogger(ROOT)
    if not root.hasHandlers():
        handler = logging.StreamHandler()
        # Steps back when the program sets up handlers for everything later on.
        handler.addFilter(lambda _record: not logging.getLogger().handlers)
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(asctime)s [%(name)s:%(lineno)d] %(message)s")
        )
        root.addHandler(handler)
