# SPDX-License-Identifier: Apache-2.0
"""Each variable: upstream's default, values that are taken and how, values that are refused."""

import grp
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kvbm.config import Tunable, load_settings, tunables
from kvbm.config.kinds import Kind, Status, is_truthy
from kvbm.errors import ConfigError

WORDS = [("1", True), ("TRUE", True), ("on", True), (" Yes ", True), ("0", False), ("off", False)]
WORDS += [("False", False), ("no", False)]
NO_WORDS = ["2", "y", "enabled", "yess"]
ANY = [("1", True), ("0", True), ("false", True), ("", True), (" ", True)]
GB = [("8", 8.0), ("0.5", 0.5), ("1e3", 1000.0), ("0", 0.0), (" 8 ", 8.0)]
NO_GB = ["8GB", "-1", "nan", "inf", "1,5", "true"]
BLOCKS = [("0", 0), ("4096", 4096), ("4294967295", 4294967295)]
NO_BLOCKS = ["-1", "4294967296", "1.5", "many"]
POSITIVE = [("1", 1), ("64", 64)]
NOT_POSITIVE = ["0", "-1", "2.5", "x"]
PORTS = [("1", 1), ("65535", 65535)]
NO_PORTS = ["0", "65536", "-1", "http", "80.5"]
OWN_GROUP = grp.getgrgid(0).gr_name

# variable: (default, values and what they give, values that are refused)
EXPECTED: dict[str, tuple[Any, list[tuple[str, Any]], list[str]]] = {
    "DYN_KVBM_CPU_CACHE_GB": (0.0, GB, NO_GB),
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": (0, BLOCKS, NO_BLOCKS),
    "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": (0, BLOCKS, NO_BLOCKS),
    "DYN_KVBM_VERIFY_HOST": (False, WORDS, NO_WORDS),
    "DYN_KVBM_EVICTION_POLICY": (
        "lru",
        [("lru", "lru"), ("Reuse", "reuse"), ("my.place:Policy", "my.place:Policy")],
        ["arc", "my.place", "my.place:", ":Policy", "my place:Policy", "1x:Policy"],
    ),
    "DYN_KVBM_DEVICE_STAGING": (True, WORDS, NO_WORDS),
    "DYN_KVBM_DEVICE_CALIBRATION": (True, WORDS, NO_WORDS),
    "DYN_KVBM_DISABLE_WRITE_COMBINED": (False, ANY, []),
    "DYN_KVBM_ENABLE_NUMA": (None, [("1", "1"), ("maybe", "maybe")], []),
    "DYN_MEMORY_DISABLE_NUMA": (False, WORDS, NO_WORDS),
    "DYN_KVBM_INSTANCE": (
        None,
        [("chat-7b_v1.2", "chat-7b_v1.2"), ("x" * 64, "x" * 64), ("p-12", "p-12")],
        ["a b", "a/b", "ä", "x" * 65, "a\n", "p-0123456789abcdef", "chat.host.0", "c.disk.12"],
    ),
    "DYN_KVBM_SHM_GROUP": (
        None,
        [("1234", 1234), ("0", 0), (OWN_GROUP, 0)],
        ["no-such-group-here", "-1", "4294967295", "1.5"],
    ),
    "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": (1800, POSITIVE, NOT_POSITIVE),
    "DYN_KVBM_LOAD_FAILURE_POLICY": (
        "recompute",
        [("recompute", "recompute"), ("Fail", "fail")],
        ["ignore", "1"],
    ),
    "DYN_KVBM_DISK_CACHE_GB": (0.0, GB, NO_GB),
    "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": (0, BLOCKS, NO_BLOCKS),
    "DYN_KVBM_DISK_CACHE_DIR": (Path("/tmp"), [("/mnt/nvme/", Path("/mnt/nvme"))], []),
    "DYN_KVBM_DISK_ALLOCATOR_TYPE": (
        "default",
        [("default", "default"), ("open-direct", "open-direct")],
        ["direct", "Default"],
    ),
    "DYN_KVBM_DISK_DISABLE_O_DIRECT": (False, ANY, []),
    "DYN_KVBM_DISK_ZEROFILL_FALLBACK": (False, ANY, []),
    "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": (False, WORDS, NO_WORDS),
    "DYN_KVBM_DISK_WRITE_BUDGET_GB_PER_DAY": (
        None,
        [("0.5", 0.5), ("1000", 1000.0)],
        ["0", "-1", "inf", "x"],
    ),
    "DYN_KVBM_NIXL_BACKEND_POSIX": (False, WORDS, NO_WORDS),
    "DYN_KVBM_NIXL_BACKEND_GDS": (False, WORDS, NO_WORDS),
    "DYN_KVBM_NIXL_BACKEND_GDS_MT": (False, WORDS, NO_WORDS),
    "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": (4, POSITIVE, NOT_POSITIVE),
    "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE": (16, POSITIVE, NOT_POSITIVE),
    "DYN_KVBM_LEADER_ZMQ_HOST": ("127.0.0.1", [("10.0.0.1", "10.0.0.1")], []),
    "DYN_KVBM_LEADER_ZMQ_PUB_PORT": (56001, PORTS, NO_PORTS),
    "DYN_KVBM_LEADER_ZMQ_ACK_PORT": (56002, PORTS, NO_PORTS),
    "DYN_KVBM_NCCL_MLA_MODE": (False, WORDS, NO_WORDS),
    "DYN_KVBM_NCCL_MAX_CTAS": (8, POSITIVE, NOT_POSITIVE),
    "DYN_FATBIN_PATH": (None, [("/opt/copy.fatbin", Path("/opt/copy.fatbin"))], []),
    "DYN_KVBM_CACHE_STATS_MAX_REQUESTS": (1000, POSITIVE, NOT_POSITIVE),
    "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS": (5, [("0", 0), ("60", 60)], ["-1", "0.5", "5s"]),
    "DYN_KVBM_METRICS": (False, WORDS, NO_WORDS),
    "DYN_KVBM_METRICS_PORT": (6880, PORTS, NO_PORTS),
    "DYN_KVBM_ENABLE_RECORD": (False, WORDS, NO_WORDS),
    "DYN_KVBM_RECORD_PATH": (Path("/tmp/records.jsonl"), [("r.jsonl", Path("r.jsonl"))], []),
    "DYN_KVBM_RECORD_MAX_GB": (4.0, [("0.5", 0.5), ("100", 100.0)], ["0", "-1", "inf", "x"]),
    "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR": (True, WORDS, NO_WORDS),
    "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE": (
        "dedup",
        [("dedup", "dedup"), ("PassThrough", "passthrough")],
        ["both"],
    ),
    "DYN_KVBM_TRTLLM_ZMQ_PORT": (None, PORTS, NO_PORTS),
    "DYN_LOG": (
        "info",
        [("debug", "debug"), ("warn,kvbm::worker=trace", "warn,kvbm::worker=trace")],
        ["kvbm=loud"],
    ),
    "OTEL_EXPORT_ENABLED": (False, WORDS, NO_WORDS),
    "DYN_RUNTIME_ENABLED_KVBM": (False, WORDS, NO_WORDS),
}
BY_VARIABLE = {t.variable: t for t in tunables()}
DEFAULTS = [(v, default) for v, (default, _, _) in EXPECTED.items()]
GOOD = [(v, text, want) for v, (_, good, _) in EXPECTED.items() for text, want in good]
BAD = [(v, text) for v, (_, _, bad) in EXPECTED.items() for text in bad]


def read(variable: str, environ: dict[str, str]) -> object:
    return getattr(load_settings(environ=environ), BY_VARIABLE[variable].field)


def test_every_tunable_is_covered_here() -> None:
    assert list(EXPECTED) == [t.variable for t in tunables()]


@pytest.mark.parametrize(("variable", "default"), DEFAULTS)
def test_an_unset_variable_has_upstreams_default(variable: str, default: object) -> None:
    value = read(variable, {})
    assert (value, type(value)) == (default, type(default))


@pytest.mark.parametrize(("variable", "text", "want"), GOOD)
def test_a_good_value_is_read(variable: str, text: str, want: object) -> None:
    value = read(variable, {variable: text})
    assert (value, type(value)) == (want, type(want))


@pytest.mark.parametrize(("variable", "text"), BAD)
def test_a_bad_value_is_refused_with_name_value_and_what_is_allowed(
    variable: str, text: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(environ={variable: text})
    allowed = BY_VARIABLE[variable].kind.allowed
    assert str(refused.value) == f"{variable}={text!r} is not valid (allowed: {allowed})"


@pytest.mark.parametrize("variable", [v for v in EXPECTED if EXPECTED[v][1] is not ANY])
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_is_not_set(variable: str, text: str) -> None:
    assert read(variable, {variable: text}) == EXPECTED[variable][0]


def test_all_bad_values_are_named_in_one_error() -> None:
    environ = {"DYN_KVBM_CPU_CACHE_GB": "x", "DYN_KVBM_METRICS_PORT": "0"}
    with pytest.raises(ConfigError) as refused:
        load_settings({"instance": "a b"}, environ)
    text = str(refused.value)
    assert text.count("is not valid") == 3
    assert "DYN_KVBM_CPU_CACHE_GB='x'" in text
    assert "DYN_KVBM_METRICS_PORT='0'" in text
    assert "kv_connector_extra_config['instance']='a b'" in text


def wrong_types(tunable: Tunable) -> list[object]:
    """JSON values that are of no use for a tunable, whatever they hold."""
    takes_numbers = re.search("integer|number|group id", tunable.kind.allowed)
    takes_booleans = isinstance(tunable.default, bool)
    wrong: list[object] = [[], [8], {}, {"size": 8}]
    if not takes_numbers:
        wrong += [0, 1, 7, 1.5]
    if not takes_booleans:
        wrong += [True, False]
    if takes_numbers and "number" not in tunable.kind.allowed:
        wrong += [1.5]
    return wrong


@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.parametrize("tunable", tunables(), ids=lambda t: t.field)
def test_a_json_value_of_the_wrong_type_is_refused(tunable: Tunable, by_variable: bool) -> None:
    key = tunable.variable if by_variable else tunable.field
    for value in wrong_types(tunable):
        with pytest.raises(ConfigError) as refused:
            load_settings({key: value}, {})
        assert str(refused.value) == (
            f"kv_connector_extra_config[{key!r}]={value!r} is not valid "
            f"(allowed: {tunable.kind.allowed})"
        )


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        ("cpu_cache_gb", 8, 8.0),
        ("cpu_cache_gb", "8", 8.0),
        ("verify_host", True, True),
        ("verify_host", "yes", True),
        ("disk_disable_o_direct", False, False),
        ("disk_disable_o_direct", True, True),
        ("disk_disable_o_direct", "0", True),
        ("shm_group", 1234, 1234),
        ("shm_group", "1234", 1234),
    ],
)
def test_json_values_and_texts_are_read(key: str, value: object, want: object) -> None:
    assert getattr(load_settings({key: value}, {}), key) == want


def test_a_group_name_gives_the_id_of_the_group() -> None:
    group = grp.getgrgid(os.getgid())
    assert load_settings({"shm_group": group.gr_name}, {}).shm_group == group.gr_gid


@pytest.mark.parametrize(("text", "want"), [*WORDS, *((w, False) for w in NO_WORDS), ("", False)])
def test_truthy_is_one_true_on_yes(text: str, want: bool) -> None:
    assert is_truthy(text) is want


def test_tunables_are_complete_and_named_by_one_rule() -> None:
    for tunable in tunables():
        assert isinstance(tunable.kind, Kind)
        assert tunable.kind.allowed
        assert isinstance(tunable.status, Status)
        assert tunable.description.endswith(".")
        assert tunable.variable in {
            prefix + tunable.field.upper() for prefix in ("DYN_KVBM_", "DYN_", "")
        }
    assert len({t.variable for t in tunables()}) == len(tunables())
