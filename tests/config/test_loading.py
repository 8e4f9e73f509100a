# SPDX-License-Identifier: Apache-2.0
"""Where settings come from, what is warned about, and the checks on sizes and tiers."""

import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import pytest

from kvbm.config import Settings, Status, Tunable, load_settings, loading, tunables
from kvbm.errors import ConfigError


@pytest.fixture(autouse=True)
def _nothing_logged_yet() -> Iterator[None]:
    loading._log_once.cache_clear()
    yield
    loading._log_once.cache_clear()


def logged(
    caplog: pytest.LogCaptureFixture,
    extra_config: Mapping[str, Any] | None,
    environ: Mapping[str, str],
) -> list[tuple[int, str]]:
    """Levels and texts that reading these settings logs."""
    caplog.clear()
    load_settings(extra_config, environ)
    return [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "kvbm.config.loading"]


# ---- precedence ----------------------------------------------------------------------------------


def test_extra_config_wins_over_the_environment_and_that_over_the_default() -> None:
    variable = "DYN_KVBM_CPU_CACHE_GB"
    assert load_settings({}, {}).cpu_cache_gb == 0
    assert load_settings({}, {variable: "1"}).cpu_cache_gb == 1
    assert load_settings({"cpu_cache_gb": 2}, {variable: "1"}).cpu_cache_gb == 2
    assert load_settings({variable: 2}, {variable: "1"}).cpu_cache_gb == 2


def test_an_explicit_value_wins_even_if_it_is_the_default() -> None:
    assert load_settings({"cpu_cache_gb": 0}, {"DYN_KVBM_CPU_CACHE_GB": "1"}).cpu_cache_gb == 0


# For those that take one of a few words only.
OTHER_VALUES = {
    "eviction_policy": "reuse",
    "kv_events_consolidator_mode": "passthrough",
    "load_failure_policy": "fail",
}


@pytest.mark.parametrize("tunable", tunables(), ids=lambda t: t.field)
def test_each_setting_can_be_given_under_both_names(tunable: Tunable) -> None:
    value = {bool: not tunable.default, str: "default"}.get(type(tunable.default), "1")
    value = OTHER_VALUES.get(tunable.field, value)
    by_field = load_settings({tunable.field: value}, {})
    by_variable = load_settings({tunable.variable: value}, {})
    assert by_field == by_variable
    assert by_field.model_fields_set == {tunable.field}


def test_values_that_differ_are_warned_about_with_both_sources(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = logged(caplog, {"cpu_cache_gb": 2}, {"DYN_KVBM_CPU_CACHE_GB": "1"})
    assert lines == [
        (
            logging.WARNING,
            (
                "kv_connector_extra_config['cpu_cache_gb']=2 is used; "
                "DYN_KVBM_CPU_CACHE_GB='1' differs and is ignored"
            ),
        )
    ]


def test_values_that_mean_the_same_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, {"cpu_cache_gb": 2}, {"DYN_KVBM_CPU_CACHE_GB": "2.0"}) == []


def test_the_fields_name_wins_over_the_variables_name_in_extra_config(
    caplog: pytest.LogCaptureFixture,
) -> None:
    extra = {"DYN_KVBM_CPU_CACHE_GB": 1, "cpu_cache_gb": 2}
    assert load_settings(extra, {}).cpu_cache_gb == 2
    loading._log_once.cache_clear()
    [(level, text)] = logged(caplog, extra, {})
    assert level == logging.WARNING
    assert "['cpu_cache_gb']=2 is used" in text
    assert "['DYN_KVBM_CPU_CACHE_GB']=1 differs" in text


def test_none_and_empty_text_in_extra_config_are_not_set() -> None:
    environ = {"DYN_KVBM_CPU_CACHE_GB": "1", "DYN_KVBM_INSTANCE": "a"}
    settings = load_settings({"cpu_cache_gb": None, "instance": ""}, environ)
    assert (settings.cpu_cache_gb, settings.instance) == (1, "a")


def test_a_bad_value_in_the_environment_is_refused_even_if_overridden() -> None:
    with pytest.raises(ConfigError, match="DYN_KVBM_CPU_CACHE_GB='x'"):
        load_settings({"cpu_cache_gb": 2}, {"DYN_KVBM_CPU_CACHE_GB": "x"})


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "3.5")
    assert load_settings().cpu_cache_gb == 3.5


def test_extra_config_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config=\['a'\] is not valid"):
        load_settings(["a"], {})  # type: ignore[arg-type]


def test_settings_are_frozen_and_refuse_unknown_names() -> None:
    settings = load_settings({}, {})
    with pytest.raises(pydantic.ValidationError):
        settings.cpu_cache_gb = 1.0
    with pytest.raises(pydantic.ValidationError):
        Settings(cpu_cache=1.0)  # type: ignore[call-arg]


# ---- warnings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("DYN_KVBM_CPU_CACHE_GBS", "DYN_KVBM_CPU_CACHE_GB"),
        ("DYN_KVBM_CPU_CACHE", "DYN_KVBM_CPU_CACHE_GB"),
        ("DYN_KVBM_METRIC", "DYN_KVBM_METRICS"),
        ("DYN_KVBM_INSTANCE_NAME", "DYN_KVBM_INSTANCE"),
        ("DYN_KVBM_DISABLE_OFFLOAD_FILTER", "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER"),
    ],
)
def test_an_unknown_variable_is_warned_about_with_the_nearest_name(
    name: str, nearest: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert logged(caplog, {}, {name: "1"}) == [
        (
            logging.WARNING,
            f"{name} is not a setting of kvbm and has no effect; did you mean {nearest}?",
        )
    ]


def test_an_unknown_name_that_resembles_nothing_gets_no_guess(
    caplog: pytest.LogCaptureFixture,
) -> None:
    [(_, text)] = logged(caplog, {}, {"DYN_KVBM_QQQ": "1"})
    assert text == "DYN_KVBM_QQQ is not a setting of kvbm and has no effect"


def test_variables_of_others_are_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, {}, {"DYN_OTHER": "1", "PATH": "/bin", "KVBM_CPU_BLOCKS": "1"}) == []


def test_an_unknown_key_of_extra_config_is_warned_about_with_the_nearest_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert logged(caplog, {"cpu_cache_gbs": 1}, {}) == [
        (
            logging.WARNING,
            (
                "kv_connector_extra_config['cpu_cache_gbs'] is not a setting of kvbm and has no "
                "effect; did you mean cpu_cache_gb?"
            ),
        )
    ]


def test_keys_of_extra_config_that_belong_to_others_are_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    extra = {"connectors": [], "kv_connector_module_path": "a.b", "kv_role": "kv_both"}
    assert logged(caplog, extra, {}) == []


@pytest.mark.parametrize(
    "name",
    [
        "DYN_KVBM_OBJECT_BUCKET",
        "DYN_KVBM_TRANSFER_BATCH_SIZE",
        "DYN_KVBM_NIXL_BACKEND_OBJ",
        "DYN_KVBM_ENABLE",
    ],
)
def test_a_variable_that_upstream_does_not_read_either_is_warned_about(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    [(level, text)] = logged(caplog, {}, {name: "1"})
    assert level == logging.WARNING
    assert text.startswith(f"{name} has no effect, neither here nor upstream: ")


def test_unneeded_settings_are_named_as_such(caplog: pytest.LogCaptureFixture) -> None:
    [(level, text)] = logged(caplog, {}, {"DYN_KVBM_LEADER_ZMQ_ACK_PORT": "56002"})
    assert level == logging.INFO
    assert text.startswith("DYN_KVBM_LEADER_ZMQ_ACK_PORT='56002' is accepted and not needed: ")


def test_unsupported_settings_are_warned_about_unless_they_are_the_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    variable = "DYN_RUNTIME_ENABLED_KVBM"
    assert logged(caplog, {}, {variable: "0"}) == []
    assert logged(caplog, {}, {variable: "1"}) == [
        (logging.WARNING, f"{variable}='1' is not supported by this version and has no effect")
    ]


def test_supported_settings_are_not_commented_on(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, {}, {"DYN_KVBM_CPU_CACHE_GB": "1", "DYN_KVBM_INSTANCE": "a"}) == []


def test_each_warning_is_logged_once_a_process(caplog: pytest.LogCaptureFixture) -> None:
    assert len(logged(caplog, {}, {"DYN_KVBM_QQQ": "1"})) == 1
    assert logged(caplog, {}, {"DYN_KVBM_QQQ": "1"}) == []


def test_unknown_names_are_logged_before_a_bad_value_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ConfigError):
        load_settings({}, {"DYN_KVBM_QQQ": "1", "DYN_KVBM_CPU_CACHE_GB": "x"})
    assert any("DYN_KVBM_QQQ" in r.getMessage() for r in caplog.records)


def test_the_log_level_is_set_before_anything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, {}, {"DYN_LOG": "off", "DYN_KVBM_QQQ": "1"}) == []
    load_settings({}, {})
    assert logging.getLogger("kvbm").level == logging.INFO


# ---- tiers ---------------------------------------------------------------------------------------


def test_the_size_of_a_tier_is_the_configured_one() -> None:
    settings = Settings(cpu_cache_gb=1.0, disk_cache_gb=2.0)
    assert settings.host_slots(10**6) == 1000
    assert settings.disk_slots(10**6) == 2000


def test_an_override_is_the_number_of_slots() -> None:
    settings = Settings(
        cpu_cache_gb=1.0, cpu_cache_override_num_blocks=7, disk_cache_override_num_blocks=9
    )
    assert (settings.host_slots(10**6), settings.disk_slots(10**6)) == (7, 9)


def test_a_size_that_holds_no_block_names_its_own_variable() -> None:
    settings = Settings(cpu_cache_gb=0.001, disk_cache_gb=0.002)
    with pytest.raises(ConfigError, match=r"^DYN_KVBM_CPU_CACHE_GB=0\.001 gives 0 blocks of 9"):
        settings.host_slots(9_000_000)
    with pytest.raises(ConfigError, match=r"^DYN_KVBM_DISK_CACHE_GB=0\.002 gives 0 blocks"):
        settings.disk_slots(9_000_000)


@pytest.mark.parametrize(
    ("field", "size"), [("cpu_cache_gb", 0.1), ("cpu_cache_override_num_blocks", 1)]
)
def test_a_host_tier_is_enough_if_it_has_a_size(field: str, size: float) -> None:
    load_settings({field: size}, {}).require_a_tier()
    with pytest.raises(ConfigError):
        load_settings({field: 0}, {}).require_a_tier()


def test_no_tier_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(ConfigError) as refused:
        Settings().require_a_tier()
    text = str(refused.value)
    assert text.startswith("no cache tier is configured")
    for part in (
        "DYN_KVBM_CPU_CACHE_GB (decimal number >= 0",
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS (integer",
        "total over all ranks",
        "kv_connector_extra_config",
    ):
        assert part in text


def test_a_tier_counts_only_if_it_is_supported() -> None:
    status = next(t.status for t in tunables() if t.field == "disk_cache_gb")
    settings = Settings(disk_cache_gb=4.0)
    if status is Status.SUPPORTED:
        settings.require_a_tier()
    else:
        with pytest.raises(ConfigError, match=r"DYN_KVBM_DISK_CACHE_GB=4.0 alone is not enough"):
            settings.require_a_tier()


def test_too_little_shared_memory_names_the_setting_that_asks_for_it() -> None:
    with pytest.raises(ConfigError, match=r"^DYN_KVBM_CPU_CACHE_GB=20.0: the host tier needs"):
        Settings(cpu_cache_gb=20.0).check_shm_room(2**60)
    with pytest.raises(ConfigError, match=r"^DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS=5 "):
        Settings(cpu_cache_override_num_blocks=5).check_shm_room(2**60)
    Settings(cpu_cache_gb=20.0).check_shm_room(0)


def test_importing_the_settings_imports_no_engine_and_no_accelerator_library() -> None:
    script = (
        "import sys, kvbm.config; kvbm.config.load_settings({}, {}); "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'vllm', 'cuda', 'nixl', 'zmq'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
