# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's own connector unit tests with kvbm's connector: ``make test-vllm-units``.

The tests are in vLLM's source distribution, not in its wheels. That of the installed version is
downloaded once, with pip, into a folder outside the repository (``KVBM_VLLM_UNITS``, by default
``~/.cache/kvbm/vllm-units``); only its ``tests`` are kept. ``--source DIR`` takes them from a
checkout instead. ``scripts/vllm_units/selection.py`` says which tests are run and why the others
are not; whatever follows ``--`` goes to pytest.

Needs an environment with vLLM (``make setup-vllm``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.vllm_units.selection import FILES, UNIT

ROOT = Path(__file__).resolve().parent.parent

# Names a model whose configuration the tests read, and nothing else of it.
MODEL = "facebook/opt-125m"
MODEL_CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 768,
    "torch_dtype": "float16",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
ENVIRONMENT = {
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "4096",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class NoTests(Exception):
    """vLLM's tests cannot be had; the message says what to do."""


def installed_version() -> str:
    """Version of the installed vLLM, without its local part."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise NoTests("vLLM is not installed here: make setup-vllm")


def default_folder() -> Path:
    """Folder of what was downloaded."""
    return Path(os.environ.get("KVBM_VLLM_UNITS") or Path.home() / ".cache" / "kvbm" / "vllm-units")


def download(version: str, into: Path) -> Path:
    """Download vLLM's source distribution; return the top of its unpacked tree.

    pip asks a source distribution for its metadata, which for this one means to begin a build, and
    so may fail after it has unpacked it: ``--no-clean`` leaves what it unpacked.
    """
    command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-binary", "vllm"]
    command += ["--no-deps", "--no-build-isolation", "--no-clean", "--dest", str(into)]
    environ = dict(os.environ, TMPDIR=str(into))
    pip = subprocess.run(
        command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for archive in into.glob("vllm-*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(into / "unpacked", filter="data")
    for tests in into.rglob(UNIT):
        return tests.parents[len(Path(UNIT).parts) - 1]
    tail = "\n".join(pip.stdout.splitlines()[-20:])
    raise NoTests(f"no source distribution of vLLM {version} with {UNIT}; pip said:\n{tail}")


def prepare(source: Path, folder: Path) -> None:
    """Put the tests, and the configuration of the model that they name, into a folder."""
    if not (source / UNIT).is_dir():
        raise NoTests(f"{source} has no {UNIT}: it is no source tree of vLLM")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "tests", ignore_errors=True)
    model = folder / MODEL
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODEL_CONFIG, indent=1) + "\n")
    shutil.copytree(source / "tests", folder / "tests.part", dirs_exist_ok=True)
    (folder / "tests.part").rename(folder / "tests")


def find_tests(source: Path | None) -> Path:
    """Folder in which the tests are, made if it is not there."""
    folder = default_folder().absolute() / f"vllm-{installed_version()}"
    if source is not None:
        prepare(source, folder)
    elif not (folder / "tests").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as into:
            prepare(download(installed_version(), Path(into)), folder)
    return folder


def command_for(folder: Path, extra: list[str]) -> list[str]:
    """Command that runs the selected tests; to be started in their folder."""
    present = [name for name in FILES if (folder / name).exists()]
    if not present:
        raise NoTests(f"{folder} has none of the files of the selection: {', '.join(FILES)}")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    command += ["-p", "scripts.vllm_units.plugin", "-W", "ignore", "--timeout=120"]
    # vLLM's general conftest needs more packages than these tests do.
    return [*command, f"--confcutdir={folder / 'tests' / 'v1'}", *present, *extra]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="vLLM's connector tests with kvbm's connector.")
    parser.add_argument("--source", type=Path, metavar="DIR", help="a source tree of vLLM")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args(arguments)
    try:
        folder = find_tests(options.source)
        command = command_for(folder, options.pytest)
    except NoTests as error:
        print(f"vllm_unit_tests.py: {error}", file=sys.stderr)
        return 1
    settings = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
    path = os.pathsep.join([str(folder), str(ROOT)])
    environ = {**settings, **ENVIRONMENT, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environ).returncode


if __name__ == "__main__":
    sys.exit(main())
