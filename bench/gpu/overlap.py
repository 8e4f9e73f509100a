# SPDX-License-Identifier: Apache-2.0
"""What a load would gain from overlapping with the step behind it, without an engine.

``python -m bench.gpu.overlap``. The step is a decode-like CUDA graph of an 8B model's size: each of
its 32 layers reads its KV and streams its weights. Some layers wait, inside the graph, for a word
that the load sets (cuStreamWaitValue32, captured). Milliseconds, medians:

step
    The graph with all words set, so that only its waits cost something.
one after the other
    The load, then the graph; and the graph behind an event of the load.
overlapped
    Both at once. The first part of the load comes as always, the last `MiB` layer by layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from cuda.bindings import driver

LAYERS = 32
TOKEN_BYTES = 4096  # of one layer
HIDDEN, QKV, GATE_UP, DOWN = 4096, 6144, 28672, 14336
WAITS: dict[str, tuple[int, ...]] = {
    "none": (),
    "each layer": tuple(range(LAYERS)),
    "each fourth layer": tuple(range(0, LAYERS, 4)),
    "seven, closer at the end": (0, 8, 16, 24, 28, 30, 31),
}
LATE_MIB = (256, 512)


def checked(result: tuple[int, ...]) -> None:
    """Raise if a call of the driver failed."""
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA error {result[0]}")


def median_ms(measure: Callable[[], float], rounds: int = 7) -> float:
    """Run once to warm up, then return the median in milliseconds."""
    measure()
    return statistics.median(measure() for _ in range(rounds)) * 1e3


class Model:
    """Weights and the KV of one prompt, on the device, and the same KV on the host."""

    def __init__(self, tokens: int) -> None:
        shapes = ((HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, GATE_UP), (DOWN, HIDDEN))
        make = torch.Generator("cuda").manual_seed(0)
        options = {"dtype": torch.bfloat16, "device": "cuda", "generator": make}
        self.weights = [[torch.randn(*s, **options) / 100 for s in shapes] for _ in range(LAYERS)]
        self.elements = tokens * TOKEN_BYTES // 4
        self.kv = [torch.zeros(self.elements, device="cuda") for _ in range(LAYERS)]
        self.host = torch.ones(LAYERS * self.elements, pin_memory=True)
        self.words = torch.ones(LAYERS, dtype=torch.int32, pin_memory=True)
        self._x = torch.randn(1, HIDDEN, **options)
        self._sums = torch.zeros(LAYERS, device="cuda")

    def word(self, layer: int) -> int:
        """Address of a layer's word, the same on host and device."""
        return int(self.words.data_ptr()) + 4 * layer

    def step(self, waits: Sequence[int]) -> None:
        """Launch one step on the current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        for layer, (qkv, out, gate_up, down) in enumerate(self.weights):
            if layer in waits:
                equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
                checked(driver.cuStreamWaitValue32(stream, self.word(layer), 1, equal))
            q = self._x @ qkv
            self._sums[layer] = self.kv[layer].sum()
            _ = (((q[:, :HIDDEN] @ out) @ gate_up)[:, :DOWN]) @ down

    def graph(self, waits: Sequence[int]) -> torch.cuda.CUDAGraph:
        """Capture a step."""
        with torch.cuda.stream(torch.cuda.Stream()):
            self.step(())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(waits)
        return graph

    def load(self, stream: torch.cuda.Stream, late: int, waits: Sequence[int]) -> None:
        """Launch the load: all but the last `late` elements of each layer, then these in order."""
        first = self.elements - late

        def copy(layer: int, begin: int, end: int) -> None:
            start = layer * self.elements
            source = self.host[start + begin : start + end]
            self.kv[layer][begin:end].copy_(source, non_blocking=True)

        with torch.cuda.stream(stream):
            for layer in range(LAYERS):
                copy(layer, 0, first)
            for layer in range(LAYERS if late else 0):
                copy(layer, first, self.elements)
                if layer + 1 in waits or layer + 1 == LAYERS:
                    begun = max(w for w in waits if w <= layer)
                    handle = stream.cuda_stream
                    checked(driver.cuStreamWriteValue32(handle, self.word(begun), 1, 0))


def measure(tokens: int) -> None:
    """Print what one length gives."""
    model = Model(tokens)
    graphs = {name: model.graph(waits) for name, waits in WAITS.items()}
    copies, engine = torch.cuda.Stream(), torch.cuda.Stream()

    def steps(graph: torch.cuda.CUDAGraph) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / 20

    def both(name: str, late: int, *, wait: str) -> float:
        torch.cuda.synchronize()
        if late:
            model.words.zero_()
        begin = time.perf_counter()
        model.load(copies, late, WAITS[name])
        if wait == "host":
            copies.synchronize()
        elif wait == "event":
            engine.wait_stream(copies)
        with torch.cuda.stream(engine):
            graphs[name].replay()
        engine.synchronize()
        return time.perf_counter() - begin

    for name, graph in graphs.items():
        print(f"{tokens} tokens, waits {name}: step {median_ms(lambda g=graph: steps(g)):.2f}")
    after = median_ms(lambda: both("none", 0, wait="host"))
    event = median_ms(lambda: both("none", 0, wait="event"))
    print(f"{tokens} tokens: one after the other {after:.2f}, behind an event {event:.2f}")
    for name, waits in WAITS.items():
        for mib in LATE_MIB if waits else ():
            late = (mib << 20) // LAYERS // 4
            got = median_ms(lambda n=name, e=late: both(n, e, wait=""))
            print(
                f"{tokens} tokens, waits {name}: overlapped, last {mib} MiB {got:.2f}", flush=True
            )


def main() -> None:
    """Print all lengths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="8192,16384,32768")
    for tokens in parser.parse_args().tokens.split(","):
        measure(int(tokens))


if __name__ == "__main__":
    main()
