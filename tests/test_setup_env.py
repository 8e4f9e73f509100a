# SPDX-License-Identifier: Apache-2.0
"""The set-up of the environment: what it refuses, what it repeats, what it says."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import setup_env
from scripts.setup_env import Environment, SetupError


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    """An environment whose Python is the running one."""
    env = Environment(tmp_path / "venv")
    env.path.mkdir()
    env.python = Path(sys.executable)
    return env


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 13, 9)])
def test_supported_versions_of_python_are_accepted(version: tuple[int, ...]) -> None:
    setup_env.check_python(version)
    assert setup_env.PYTHON_MIN <= version[:2] <= setup_env.PYTHON_MAX


@pytest.mark.parametrize(
    ("version", "with_vllm", "allowed"),
    [
        ((3, 9, 1), False, "3.10 to 3.13"),
        ((3, 14, 0), False, "3.10 to 3.13"),
        ((3, 10, 0), True, "3.11 to 3.13"),
    ],
)
def test_other_versions_of_python_are_refused_with_what_is_allowed(
    version: tuple[int, ...], with_vllm: bool, allowed: str
) -> None:
    with pytest.raises(SetupError, match=allowed) as caught:
        setup_env.check_python(version, with_vllm)
    assert f"Python {version[0]}.{version[1]} at {sys.executable}" in str(caught.value)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SetupError, match="looked for gcc, cc, clang"):
        setup_env.check_compiler()
    monkeypatch.setenv("CC", "no-such-cc -m64")
    with pytest.raises(SetupError, match="looked for no-such-cc"):
        setup_env.check_compiler()


def test_missing_headers_of_python_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(setup_env.sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(SetupError, match=r"Python\.h is missing"):
        setup_env.check_compiler()


def test_a_step_runs_once_for_a_key_and_again_for_another(env: Environment) -> None:
    runs: list[str] = []
    for key in ("a", "a", "b", "b", "a"):
        env.step("torch", key, "installing", lambda key=key: runs.append(key))
    assert runs == ["a", "b", "a"]


def test_a_step_that_failed_runs_again(env: Environment) -> None:
    def fail() -> None:
        raise SetupError("no")

    with pytest.raises(SetupError):
        env.step("torch", "a", "installing", fail)
    runs: list[int] = []
    env.step("torch", "a", "installing", lambda: runs.append(1))
    assert runs == [1]


def test_a_failed_command_is_shown_with_the_end_of_its_output(env: Environment) -> None:
    code = "print('first'); [print(i) for i in range(60)]; raise SystemExit(3)"
    with pytest.raises(SetupError, match="status 3") as caught:
        env.run("-c", code)
    lines = str(caught.value).splitlines()
    assert lines[-1] == "59"
    assert "first" not in lines
    assert "first" in env.log.read_text().splitlines()


def test_an_unreachable_package_index_is_named(env: Environment) -> None:
    code = "raise SystemExit('pip: NewConnectionError: failed')"
    with pytest.raises(SetupError, match="PIP_INDEX_URL or PIP_FIND_LINKS"):
        env.run("-c", code)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SetupError, match="is not a virtual environment"):
        Environment(tmp_path).create()
    assert (tmp_path / "file").read_text() == "mine"


def test_the_parts_of_a_key_are_kept_apart() -> None:
    assert setup_env.digest(["ab", "c"]) != setup_env.digest(["a", "bc"])
    assert setup_env.digest(["ab", b"c"]) == setup_env.digest([b"ab", "c"])


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("torch==2.13.0", "torch"),
        ("Typing_Extensions >=4 ; python_version > '3'", "typing-extensions"),
        ("uvicorn[standard]>=0.1", "uvicorn"),
        ("name@file.whl", "name"),
    ],
)
def test_the_name_is_read_from_a_requirement(requirement: str, name: str) -> None:
    assert setup_env.requirement_name(requirement) == name


def test_a_wheels_requirements_leave_out_extras_and_what_is_installed_apart(
    tmp_path: Path,
) -> None:
    requirements = ["numpy", "torch==1; sys_platform != 'x'", "torchaudio", "ray; extra == 'ray'"]
    metadata = "Name: x\n" + "".join(f"Requires-Dist: {line}\n" for line in requirements)
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x-1.dist-info/METADATA", metadata)
    assert setup_env.wheel_requirements(wheel) == ["numpy"]


def test_the_cpu_build_is_found_under_the_engines_name(env: Environment) -> None:
    env.site_packages().mkdir(parents=True)
    setup_env.name_vllm(env)
    code = (
        "import importlib.metadata, sys; sys.path.insert(0, sys.argv[1]); "
        "print(importlib.metadata.version('vllm'))"
    )
    command = [sys.executable, "-c", code, str(env.site_packages())]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == setup_env.VLLM.split("==")[1] + "+cpu"


def test_the_packages_of_the_calling_interpreter_are_seen(env: Environment, tmp_path: Path) -> None:
    env.site_packages().mkdir(parents=True)
    setup_env.link_interpreter_packages(env)
    code = "import site, sys; site.addsitedir(sys.argv[1]); import pytest; print(pytest.__file__)"
    # Isolated and without its own site-packages, the interpreter has only what the link adds.
    command = [sys.executable, "-I", "-S", "-c", code, str(env.site_packages())]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == pytest.__file__


def test_an_error_is_one_message_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("KVBM_VENV", str(tmp_path))
    assert setup_env.main([]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    tmp_path.with_name(tmp_path.name + ".lock").unlink()


def test_an_environment_without_nixl_is_complete(
    env: Environment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(*_: str) -> None:
        raise SetupError("no such version")

    monkeypatch.setattr(env, "pip", refusing)
    setup_env.install_nixl(env)
    assert "skipped" in capsys.readouterr().out
    assert not (env.stamps / "nixl").exists()
    monkeypatch.setattr(env, "pip", lambda *_: None)
    setup_env.install_nixl(env)
    assert (env.stamps / "nixl").exists()
