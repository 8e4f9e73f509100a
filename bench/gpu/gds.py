# SPDX-License-Identifier: Apache-2.0
"""What NIXL's file backends can do on this machine, and why not what they cannot.

``python -m bench.gpu.gds [--folder DIR]``. First what GPUDirect Storage is made of: the kernel
module, cuFile and its configuration, what the folder lies on. Then each backend in a process of its
own (a crash is a result, too), step by step until one fails: plugin, creation, a file registered,
reads and writes between the file and host memory and between the file and the device's memory, the
bytes compared each time, and the speed of the latter. GDS and GDS_MT are tried again with cuFile's
compatibility mode forbidden: what works then is direct, and what works only with it goes through
host memory inside cuFile.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvbm.transfer.nixl import NIXL_BACKENDS, nixl_library

CUFILE_LIBRARY = "libcufile.so.0"
CUFILE_CONFIG = "/etc/cufile.json"
STATISTICS = Path("/proc/driver/nvidia-fs/stats")
MODULES = ("nvidia", "nvidia_fs", "nvidia_peermem", "nvme", "virtio_blk")
BLOCK_BYTES = 2 << 20
TIMEOUT_S = 120.0
LOG_LINES = 12


# ---- what is there -------------------------------------------------------------------------------
def text_of(path: str | Path) -> str | None:
    """Content of a small file, None if it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text().strip()
    return None


def json_with_comments(text: str) -> Any:
    """Value of a JSON text in which ``//`` begins a comment, as in cufile.json."""
    without = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda m: m[1] or "", text)
    return json.loads(re.sub(r",(\s*[}\]])", r"\1", without))


def mount_of(folder: Path) -> str:
    """What a folder lies on: file system, its options, and the driver of its disk."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, more = line.partition(" - ")
        if fields.split()[2] == number:
            kind, source, options = more.split()[:3]
            disk = Path("/sys/dev/block", number).resolve()
            drivers = {
                (parent / "driver").resolve().name
                for parent in (disk / "device", *disk.parents)
                if (parent / "driver").is_symlink()
            }
            named = ", ".join(sorted(drivers)) or "none to be seen"
            return f"{kind} on {source} ({options}), drivers below: {named}"
    return f"nothing is mounted as {number}"


def cufile_version() -> str:
    """Version of cuFile, or why it cannot be loaded."""
    try:
        library = ctypes.CDLL(CUFILE_LIBRARY)
        version = ctypes.c_int()
        status = library.cuFileGetVersion(ctypes.byref(version))
        return f"version {version.value}" if status == 0 else f"cuFileGetVersion: {status}"
    except (OSError, AttributeError) as error:
        return str(error)


def cufile_settings() -> str:
    """Where cuFile's configuration is, and what of it decides how bytes go."""
    path = os.environ.get("CUFILE_ENV_PATH_JSON", CUFILE_CONFIG)
    text = text_of(path)
    if text is None:
        return f"{path} is not there: cuFile's defaults"
    try:
        properties = json_with_comments(text).get("properties", {})
    except ValueError as error:
        return f"{path} cannot be read: {error}"
    wanted = ("compat", "p2pdma", "pci", "max_direct", "device_cache", "io_batch")
    found = {k: v for k, v in properties.items() if any(word in k for word in wanted)}
    return f"{path}: {json.dumps(found)}"


def facts(folder: Path) -> dict[str, str]:
    """What GPUDirect Storage needs, as far as it can be seen from here."""
    loaded = [name for name in MODULES if Path("/sys/module", name).is_dir()]
    nodes = sorted(str(path) for path in Path("/dev").glob("nvidia-fs*"))
    driver = (text_of("/proc/driver/nvidia/version") or "no NVIDIA driver").splitlines()[0]
    return {
        "driver": driver,
        "kernel modules loaded": f"{', '.join(loaded) or 'none'} (of {', '.join(MODULES)})",
        "nvidia-fs": text_of("/proc/driver/nvidia-fs/version") or "no /proc/driver/nvidia-fs",
        "device nodes of nvidia-fs": ", ".join(nodes) or "none",
        CUFILE_LIBRARY: cufile_version(),
        "configuration": cufile_settings(),
        str(folder): mount_of(folder),
    }


# ---- one backend, in a process of its own --------------------------------------------------------
class Failed(Exception):
    """A step did not work; the others need it."""


@contextlib.contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Print whether a step works, with what is added to the list."""
    more: list[str] = []
    began = time.perf_counter()
    try:
        yield more
    except Exception as error:
        print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
        raise Failed(name) from error
    millis = (time.perf_counter() - began) * 1e3
    print(f"{name}: ok, {', '.join([*more, f'{millis:.1f} ms'])}", flush=True)


def loaded_libraries(word: str) -> list[str]:
    """Paths of the mapped libraries with a word in their name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if word in line.rpartition("/")[2]})


class Trial:
    """One agent with one backend, and a file that it moves blocks from and to.

    Parameters
    ----------
    library
        From `nixl_library`.
    kind
        Name of the backend.
    fd
        The file, opened with O_DIRECT.
    blocks
        Blocks in it.
    """

    def __init__(self, library: Any, kind: str, fd: int, blocks: int) -> None:
        self.kinds, self._fd, self._blocks = [kind], fd, blocks
        config = library.nixl_agent_config(enable_prog_thread=False, backends=[])
        self.name = f"gds-{os.getpid()}"
        self.agent = library.nixl_agent(self.name, config)

    def _blocks_at(self, base: int, device: int) -> Any:
        table = np.empty((self._blocks, 3), np.uint64)
        table[:, 0] = base + BLOCK_BYTES * np.arange(self._blocks, dtype=np.uint64)
        table[:, 1], table[:, 2] = BLOCK_BYTES, device
        return table

    def register(self, memory: str, address: int, device: int) -> Any:
        """Register as much memory as the file is long, or the file."""
        what = (address, self._blocks * BLOCK_BYTES, device, "")
        return self.agent.register_memory([what], memory, backends=self.kinds)

    def move(self, operation: str, memory: str, address: int, device: int) -> float:
        """Move all blocks; returns seconds."""
        ours = self.agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", self._blocks_at(address, device), memory, backends=self.kinds
        )
        file = self.agent.prep_xfer_dlist(
            self.name, self._blocks_at(0, self._fd), "FILE", backends=self.kinds
        )
        order = np.arange(self._blocks, dtype=np.int32)
        handle = self.agent.make_prepped_xfer(
            operation, ours, order, file, order[::-1].copy(), backends=self.kinds
        )
        began = time.perf_counter()
        state = self.agent.transfer(handle)
        while state == "PROC":
            if time.perf_counter() > began + TIMEOUT_S / 4:
                raise TimeoutError("the transfer does not end")
            state = self.agent.check_xfer_state(handle)
        seconds = time.perf_counter() - began
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        self.agent.release_xfer_handle(handle)
        return seconds


def turned(blocks: torch.Tensor) -> torch.Tensor:
    """The blocks in reverse order, as `Trial.move` pairs them."""
    return blocks.reshape(-1, BLOCK_BYTES).flip(0).reshape(-1)


class TrialFile:
    """A file without a name, and its content read and written plainly."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        nameless = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:  # once more, as a slab's data: cuFile refuses O_TMPFILE among a descriptor's flags
            again = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
            self.fd = os.open(f"/proc/self/fd/{nameless}", again)
        finally:
            os.close(nameless)
        os.posix_fallocate(self.fd, 0, size)
        self._memory = mmap.mmap(-1, size)  # aligned, as O_DIRECT wants it

    def _all(self, call: Callable[..., int]) -> None:
        done = 0
        with memoryview(self._memory) as view:
            while done < self.size:
                with view[done : done + (64 << 20)] as piece:
                    done += call(self.fd, [piece], done)

    def write(self, content: torch.Tensor) -> None:
        """Give the file this content."""
        self._memory[:] = content.numpy().tobytes()
        self._all(os.pwritev)

    def read(self) -> torch.Tensor:
        """Return the file's content."""
        self._all(os.preadv)
        return torch.frombuffer(bytearray(self._memory[:]), dtype=torch.uint8)


def compared(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise if the bytes differ."""
    wrong = int((found != wanted).sum())
    if wrong:
        raise RuntimeError(f"{wrong:,} of {wanted.numel():,} bytes are other ones")


def try_memory(trial: Trial, file: TrialFile, memory: str, kind: str, device: int) -> None:
    """Read and write between the file and memory on a device, compare, and measure."""

    def random_bytes(seed: int) -> torch.Tensor:
        make = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (file.size,), dtype=torch.uint8, generator=make)

    def synchronize() -> None:
        if kind == "cuda":
            torch.cuda.synchronize()

    if kind == "cuda":
        ours = torch.zeros(file.size, dtype=torch.uint8, device=kind)
    else:  # whole pages, as O_DIRECT wants them
        ours = torch.frombuffer(mmap.mmap(-1, file.size), dtype=torch.uint8)
    synchronize()
    with step(f"{memory} registered"):
        registered = trial.register(memory, ours.data_ptr(), device)
    with step(f"file -> {memory}, compared") as more:
        wanted = random_bytes(1)
        file.write(wanted)
        seconds = []
        for _ in range(4):
            ours.zero_()
            synchronize()
            seconds.append(trial.move("READ", memory, ours.data_ptr(), device))
            synchronize()
            compared(turned(ours), wanted.to(kind))
        more.append(f"{file.size / statistics.median(seconds[1:]) / 1e9:.2f} GB/s")
    with step(f"{memory} -> file, compared") as more:
        wanted = random_bytes(2)
        ours.copy_(wanted)
        synchronize()
        taken = trial.move("WRITE", memory, ours.data_ptr(), device)
        compared(turned(file.read()), wanted)
        more.append(f"{file.size / taken / 1e9:.2f} GB/s")
    with step(f"{memory} deregistered"):
        trial.agent.deregister_memory(registered, backends=trial.kinds)


def run_trial(kind: str, folder: Path, mib: int, device: str) -> bool:
    """All steps of one backend; False where one fails."""
    before = text_of(STATISTICS)
    works = True
    try:
        with step("library"):
            library = nixl_library()
        with step("file made"):
            file = TrialFile(folder, max(1, (mib << 20) // BLOCK_BYTES) * BLOCK_BYTES)
        with step("agent and backend") as more:
            trial = Trial(library, kind, file.fd, file.size // BLOCK_BYTES)
            trial.agent.create_backend(kind, {})
            more.append(f"memory {', '.join(map(str, trial.agent.get_backend_mem_types(kind)))}")
            more.extend(loaded_libraries("libcufile"))
        with step("file registered"):
            trial.register("FILE", 0, file.fd)
        for memory, place in (("DRAM", "cpu"), *((("VRAM", "cuda"),) if device == "cuda" else ())):
            try:
                try_memory(trial, file, memory, place, 0)
            except Failed:
                works = False
    except Failed:
        works = False
    after = text_of(STATISTICS)
    if after is not None:
        changed = set(after.splitlines()) - set((before or "").splitlines())
        print("nvidia-fs counted: " + ("; ".join(sorted(changed)) or "nothing"), flush=True)
    return works


# ---- all of it -----------------------------------------------------------------------------------
def run_apart(kind: str, options: argparse.Namespace, compat: bool | None) -> None:
    """Run one backend's trial in a process, and print what it and cuFile say."""
    command = [sys.executable, "-m", "bench.gpu.gds", "--trial", kind]
    command += ["--folder", str(options.folder), "--mib", str(options.mib)]
    command += ["--device", options.device]
    how = "" if compat is None else f", compatibility mode {'allowed' if compat else 'forbidden'}"
    print(f"\n{kind}{how}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "cufile.log")
        environment = os.environ | {
            "NIXL_LOG_LEVEL": "WARN",
            "CUFILE_LOGFILE_PATH": str(log),
            "CUFILE_LOGGING_LEVEL": "INFO",
        }
        if compat is not None:
            environment["CUFILE_ALLOW_COMPAT_MODE"] = str(compat).lower()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
            said, complaints = done.stdout, done.stderr
            if done.returncode not in (0, 1):
                said += f"the process ended with {done.returncode}\n"
        except subprocess.TimeoutExpired as error:
            said = f"{_text(error.stdout)}it did not end within {TIMEOUT_S:.0f} s\n"
            complaints = _text(error.stderr)
        print("".join(f"  {line}\n" for line in said.splitlines()), end="")
        for title, text in (("NIXL", complaints), ("cuFile", text_of(log) or "")):
            lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
            for line in lines[-LOG_LINES:]:
                print(f"  {title} says: {line[:240]}", flush=True)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def report(options: argparse.Namespace) -> None:
    """Print facts and all trials."""
    for name, value in facts(options.folder).items():
        print(f"{name}: {value}", flush=True)
    for kind in NIXL_BACKENDS:
        for compat in (None,) if kind == "POSIX" else (True, False):
            run_apart(kind, options, compat)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.gds", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk")
    parser.add_argument("--mib", type=int, default=256, help="bytes of one transfer")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--trial", choices=NIXL_BACKENDS, help="this backend, in this process")
    options = parser.parse_args(arguments)
    if options.trial:
        return 0 if run_trial(options.trial, options.folder, options.mib, options.device) else 1
    report(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
