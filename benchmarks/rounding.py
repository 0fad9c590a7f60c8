"""How many weights a second are rounded onto GGUF's grids, by torch and by compiled loops, which take turns.

    python benchmarks/rounding.py [--grids q4_0,q4_k] [--shapes 576x576,2048x2048] [--threads 1,2] [--passes 2] [--turns 3]

Rows are coupled by the metric of their outputs, and every part is visited again as often as `quantize` does by default. The
error is that of compiled loops against that of torch, in the same metric; medians of the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

from tsotsallm import machine

machine.wait_passively()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tsotsallm.numerics.ggml import Blocks, GgmlGrid  # noqa: E402
from tsotsallm.numerics.gptq import reversed_factor  # noqa: E402
from tsotsallm.numerics.rounding import OUTPUTS, block_order, round_to_blocks  # noqa: E402


def problem(d_out: int, d_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (d_out, d_in), the damped Gram of inputs that belong together, and the damped metrics of its outputs."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(d_in + 512, d_in, generator=generator)
    inputs = inputs + 0.5 * inputs @ torch.randn(d_in, d_in, generator=generator) / d_in ** 0.5
    inputs *= torch.rand(d_in, generator=generator) + 0.2
    metrics = []
    for first in range(0, d_out, OUTPUTS):
        rows = min(OUTPUTS, d_out - first)
        directions = torch.randn(rows, 4, generator=generator)
        metric = directions @ directions.mT + 0.5 * torch.eye(rows)
        metrics.append(torch.nn.functional.pad(metric / metric.diagonal().mean(), (0, min(OUTPUTS, d_out) - rows)))
    return torch.randn(d_out, d_in, generator=generator) * 0.1, inputs.mT @ inputs, torch.cat(metrics)


def error(found: Blocks, weight: Tensor, gram: Tensor, metrics: Tensor) -> float:
    """The error of coupled rows, without damping of the Gram."""
    difference, total = weight - found.dequantise(), 0.0
    for rows in difference.split(OUTPUTS):
        metric, metrics = metrics[:len(rows), :len(rows)], metrics[len(rows):]
        total += float((metric @ rows @ gram * rows).double().sum())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="q4_0,q4_k")
    parser.add_argument("--shapes", default="576x576,1536x576,576x1536,2048x2048", help="rows x columns")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    print(f"numba {machine.compiler()}\n\n| grid | shape | threads | torch | compiled | ratio | of the processor's time | "
          "equal codes | error |\n|---|---|---|---|---|---|---|---|---|")
    for name in asked.grids.split(","):
        for shape in asked.shapes.split(","):
            d_out, d_in = map(int, shape.split("x"))
            grid = GgmlGrid(name)
            if d_in % grid.layout.block:
                continue
            weight, gram, metrics = problem(d_out, d_in)
            order = block_order(gram.diagonal(), grid)
            factor = reversed_factor(gram, order, 0.01)

            def rounded(compiled: bool) -> tuple[Blocks, float, float]:
                os.environ[machine.COMPILED] = str(int(compiled))
                began, used = time.perf_counter(), time.process_time()
                found = round_to_blocks(weight, factor, order, grid, passes=asked.passes, outputs=metrics)  # noqa: B023
                return found, time.perf_counter() - began, time.process_time() - used

            for threads in map(int, asked.threads.split(",")):
                with machine.on_threads(threads):
                    rounded(True)                                   # compiles, or loads what was compiled
                    turns = [(rounded(False), rounded(True)) for _ in range(asked.turns)]
                slow, fast = turns[0][0][0], turns[0][1][0]
                wall = [statistics.median(turn[which][1] for turn in turns) for which in (0, 1)]
                ratio = statistics.median(one[1] / other[1] for one, other in turns)
                used = statistics.median(one[2] / other[2] for one, other in turns)
                equal = float((slow.codes == fast.codes).float().mean())
                worse = error(fast, weight, gram, metrics) / error(slow, weight, gram, metrics) - 1
                print(f"| {name} | {shape} | {threads} | {weight.numel() / wall[0] / 1e6:.2f} M/s | "
                      f"{weight.numel() / wall[1] / 1e6:.2f} M/s | {ratio:.1f} | {used:.1f} | {equal:.2%} | {worse:+.2%} |",
                      flush=True)


if __name__ == "__main__":
    main()
