# SPDX-License-Identifier: Apache-2.0
"""DYN_LOG and the ``kvbm`` loggers."""

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvbm.log import OFF, TRACE, configure, parse_directives


@pytest.fixture
def loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The ``kvbm`` logger; levels and handlers are put back, and none is left."""
    names = ("kvbm", "kvbm.worker")
    before = {name: logging.getLogger(name).level for name in names}
    root = logging.getLogger("kvbm")
    monkeypatch.setattr(root, "handlers", [])
    yield root
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def without_root_handlers(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The root logger as in an engine. Called in a test's body: pytest adds its handlers there."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    return logging.getLogger()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", {"kvbm": logging.INFO}),
        ("info", {"kvbm": logging.INFO}),
        ("DEBUG", {"kvbm": logging.DEBUG}),
        ("warn", {"kvbm": logging.WARNING}),
        ("error", {"kvbm": logging.ERROR}),
        ("trace", {"kvbm": TRACE}),
        ("off", {"kvbm": OFF}),
        ("warn,kvbm=debug", {"kvbm": logging.DEBUG}),
        ("kvbm=debug,warn", {"kvbm": logging.DEBUG}),
        (
            " warn , kvbm::worker = trace ",
            {"kvbm": logging.WARNING, "kvbm.worker": TRACE},
        ),
        ("kvbm.worker=error", {"kvbm": logging.INFO, "kvbm.worker": logging.ERROR}),
        ("kvbm::worker", {"kvbm": logging.INFO, "kvbm.worker": TRACE}),
        ("hyper=off,tower[span{x=1}]=loud,h2", {"kvbm": logging.INFO}),
        ("kvbmx=off", {"kvbm": logging.INFO}),
    ],
)
def test_directives_give_levels_of_own_loggers(text: str, want: dict[str, int]) -> None:
    assert parse_directives(text) == want


@pytest.mark.parametrize("text", ["kvbm=loud", "info,kvbm::worker=", "kvbm=10"])
def test_an_unknown_level_of_an_own_logger_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be one of trace, debug, info, warn, error, off"):
        parse_directives(text)


def test_configure_sets_levels(loggers: logging.Logger) -> None:
    configure("error,kvbm::worker=trace")
    assert loggers.level == logging.ERROR
    assert logging.getLogger("kvbm.worker").isEnabledFor(TRACE)
    assert logging.getLevelName(TRACE) == "TRACE"
    configure("off")
    assert not loggers.isEnabledFor(logging.CRITICAL)


def test_records_go_to_one_handler_where_nobody_else_takes_them(
    loggers: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_root_handlers(monkeypatch)
    configure()
    configure()
    [handler] = loggers.handlers
    assert isinstance(handler, logging.StreamHandler)
    stream = io.StringIO()
    handler.setStream(stream)
    logging.getLogger("kvbm.worker").info("a line")
    assert stream.getvalue().startswith("INFO ")
    assert stream.getvalue().endswith("] a line\n")


def test_no_handler_is_added_where_the_program_has_one(loggers: logging.Logger) -> None:
    assert logging.getLogger().handlers
    configure()
    assert loggers.handlers == []


def test_the_own_handler_steps_back_for_later_ones(
    loggers: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = without_root_handlers(monkeypatch)
    configure()
    [handler] = loggers.handlers
    assert isinstance(handler, logging.StreamHandler)
    own, theirs = io.StringIO(), io.StringIO()
    handler.setStream(own)
    root.addHandler(logging.StreamHandler(theirs))
    loggers.warning("a line")
    assert (own.getvalue(), theirs.getvalue()) == ("", "a line\n")


def test_importing_configures_nothing() -> None:
    script = (
        "import logging, kvbm.config, kvbm.log; k = logging.getLogger('kvbm'); "
        "print(k.handlers, k.level, logging.getLogger().handlers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[] 0 []"
