# SPDX-License-Identifier: Apache-2.0
"""What the library measures at its first start on a device, and how long that takes.

``python -m bench.gpu.calibration [--rounds 3]`` on a machine with a CUDA device. The file in
XDG_CACHE_HOME is neither read nor written.
"""

from __future__ import annotations

import argparse
import time

from kvbm._fast.cuda_device import CudaDevice
from kvbm.transfer.calibration import Trial, crossover_from, measure


def main() -> None:
    """Print one table a round: GB/s of both directions at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    trial = Trial()
    for _ in range(options.rounds):
        begin = time.perf_counter()
        times = measure(CudaDevice(0), trial)
        seconds = time.perf_counter() - begin
        print(f"{seconds:.3f} s: {crossover_from(times)}")
        print("| bytes of a piece | " + " | ".join(map(str, trial.sizes)) + " |")
        print("|---|" + "---|" * len(trial.sizes))
        for way, found in times.items():
            speeds = (f"{2 * trial.direction_bytes / found[size]:.1f}" for size in trial.sizes)
            print(f"| {way} | " + " | ".join(speeds) + " |", flush=True)


if __name__ == "__main__":
    main()
