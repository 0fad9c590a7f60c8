"""Our blocks against those of ggml's own quantiser, with and without importance matrix, at the same bytes.

    python benchmarks/gguf_quality.py --work DIR [--grids q4_0,q4_k,...] [--model DIR --text FILE --calibration FILE]
    python benchmarks/gguf_quality.py --work DIR --mixed      a grid for every matrix, against mixtures of the same bytes

Same weights, same calibration text; KL divergence from the original on held-out text in float32. Embeddings are alike (16
bit); with --mixed they are part of the mixture: against our own uniform grids, and against llama.cpp's Q4_K_M and IQ4_XS
with importance matrix (its rules for a model of this shape; tied embeddings in Q6_K).
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import tsotsallm
from tsotsallm.calibration import Calibration, calibration_corpus
from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.view import View
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.streaming.sweep import TwoStates, embed_corpus, sweep

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.ggml_files import Shape, type_in
from tests import llama

Importance = dict[str, torch.Tensor]


def importance_matrix(checkpoint: Checkpoint, calibration: Calibration, work: Path) -> Importance:
    """Mean squares of every linear's inputs in the original model, as llama-imatrix gathers them."""
    corpus, view = calibration_corpus(checkpoint, calibration), View.of(checkpoint)
    states = TwoStates(work / "states", [len(window) for window in corpus.windows], view.spec.hidden)
    embed_corpus(view, corpus, states.inputs_of(0))
    found: Importance = {}
    for visit in sweep(view, states, observe=True, device=torch.device("cpu")):
        for name in visit.names:
            found[layer_prefix(visit.index) + name] = visit.gram_of(name).diagonal / corpus.tokens
    states.remove()
    return found


def by_ggml(checkpoint: Checkpoint, types: dict[str, str | None], importance: Importance | None, out: Path) -> Path:
    """A float32 checkpoint with the values that ggml's quantiser gives; linear -> its type."""
    model, tokenizer = tsotsallm.load(checkpoint.directory)
    for name, kind in types.items():
        if kind is None:
            continue
        linear = model.get_submodule(name)
        weight = linear.weight.data
        matrix = importance[name].numpy() if importance is not None and name in importance else None
        blocks = llama.quantise(kind, weight.numpy(), matrix)
        linear.weight.data = torch.from_numpy(llama.dequantise(kind, blocks, weight.shape[1]))
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def linears(checkpoint: Checkpoint) -> list[str]:
    return [layer_prefix(stored) + name.removesuffix(".weight") for stored in sorted(set(checkpoint.spec.layer_order))
            for name in checkpoint.layer_names(stored) if name.endswith("_proj.weight")]


def fitting(checkpoint: Checkpoint, grid: str) -> dict[str, str | None]:
    """Every linear's type where all take the same grid, those that it does not divide the next one, or none."""
    found = {}
    for name in linears(checkpoint):
        fits = GgmlGrid(grid).fitting(checkpoint.shape_of(f"{name}.weight")[1])
        found[name] = fits.type if fits is not None else None
    return found


def mixture(checkpoint: Checkpoint, file_type: str) -> dict[str, str | None]:
    """Which type llama.cpp's own mixtures give each linear."""
    spec = checkpoint.spec
    shape = Shape(spec.layers, spec.heads // spec.kv_heads >= 4)
    return {module: type_in(file_type, shape, int(module.split(".")[2]), module.rpartition(".")[2])
            for module in linears(checkpoint)}


def stored_bytes(checkpoint: Checkpoint, types: dict[str, str | None]) -> int:
    return sum(int(rows * columns * GgmlGrid(str(kind)).bits_per_weight / 8)
               for name, kind in types.items() for rows, columns in [checkpoint.shape_of(f"{name}.weight")])


def compare_mixtures(asked: argparse.Namespace, checkpoint: Checkpoint, importance: Importance,
                     loss: Callable[[Path], tuple[float, float]]) -> None:
    weights = sum(math.prod(checkpoint.shape_of(f"{name}.weight")) for name in [*linears(checkpoint), "model.embed_tokens"])
    print("| against | bytes of all matrices | theirs | ours, mixed | ours / theirs |\n|---|---|---|---|---|")
    for name in ("Q4_K_M", "IQ4_XS", "uniform q3_k", "uniform q4_k", "uniform q5_k"):
        out = asked.work / f"mixed-{name.replace(' ', '-')}"
        for path in (out, asked.work / "uniform"):
            shutil.rmtree(path, ignore_errors=True)
        settings = {"calibration": asked.calibration, "windows": asked.windows, "window": asked.window, "seed": asked.seed}
        if name.startswith("uniform"):
            grid = name.split()[1]
            tsotsallm.compress(asked.model, [{"quantize": {"grid": grid, "ends": grid}}], asked.work / "uniform", **settings)
            theirs = loss(asked.work / "uniform")[0]
            bits = GgmlGrid(grid).bits_per_weight
        else:
            types = mixture(checkpoint, name) | {"model.embed_tokens": "q6_k"}
            theirs = loss(by_ggml(checkpoint, types, importance, asked.work / "theirs"))[0]
            bits = 8 * stored_bytes(checkpoint, types) / weights
        tsotsallm.compress(asked.model, [{"quantize": {"bits_per_weight": bits}}], out, **settings)
        ours = loss(out)[0]
        megabytes = bits * weights / 8 / 1e6
        print(f"| {name} | {megabytes:.2f} MB | {theirs:.5f} | {ours:.5f} | {ours / theirs:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--grids", default="q4_0,q4_1,q4_k,iq4_nl,iq4_xs,q5_k,q3_k,q2_k")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed", action="store_true")
    asked = parser.parse_args()
    checkpoint = Checkpoint.open(asked.model)
    settings = Calibration(asked.calibration and str(asked.calibration), asked.windows, asked.window, asked.seed)
    asked.work.mkdir(parents=True, exist_ok=True)
    importance = importance_matrix(checkpoint, settings, asked.work)

    def loss(model: Path) -> tuple[float, float]:
        found = tsotsallm.evaluate(model, asked.text, reference=asked.model, limit=asked.limit)
        assert found.kl is not None
        return found.kl, found.perplexity

    if asked.mixed:
        compare_mixtures(asked, checkpoint, importance, loss)
        return
    print("| grid | ggml | ggml, importance matrix | ours | ours / importance matrix | perplexity |")
    print("|---|---|---|---|---|---|")
    for grid in asked.grids.split(","):
        types = fitting(checkpoint, grid)
        theirs = [loss(by_ggml(checkpoint, types, matrix, asked.work / "theirs")) for matrix in (None, importance)]
        out = asked.work / f"ours-{grid}"
        shutil.rmtree(out, ignore_errors=True)
        tsotsallm.compress(asked.model, f"gptq:{grid}", out, calibration=asked.calibration, windows=asked.windows,
                           window=asked.window, seed=asked.seed)
        ours = loss(out)
        print(f"| {grid} | {theirs[0][0]:.5f} | {theirs[1][0]:.5f} | {ours[0]:.5f} | {ours[0] / theirs[1][0]:.3f} | "
              f"{theirs[1][1]:.4f} → {ours[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
