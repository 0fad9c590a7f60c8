"""What llama.cpp's rounding of activations costs, matrix by matrix: its integer kernels round what a linear reads to 8 bits.

    python benchmarks/activations.py --model FILE_OR_DIR --text FILE [--windows 4] [--window 512]

In blocks of 32 columns beside q4_0, q5_0, q8_0 and iq4_nl, of 256 beside q2_k to q6_k and iq4_xs. Weights stay as they are,
so that what is measured is the rounding of activations alone, which float32 does not show: KL divergence from the same model
without it, of one kind of linear at a time, then of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.resident import resident
from tsotsallm.streaming.corpus import evaluation_windows, read_text

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
BLOCKS = (32, 256)


def rounded(values: Tensor, block: int) -> Tensor:
    """Activations (..., width) in 8 bits, a scale for each block: ggml's q8_0, or q8_K where the block has 256 columns."""
    if values.shape[-1] % block:
        block = 32          # llama.cpp takes another grid where a row is no whole number of blocks
    blocks = values.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale.clamp(min=1e-30)).round() * scale).flatten(-2)


@contextmanager
def rounding(model: Any, kinds: tuple[str, ...], block: int) -> Iterator[None]:
    """Round what linears of some kinds read."""
    hooks = [module.register_forward_pre_hook(lambda _module, given: (rounded(given[0], block), *given[1:]))
             for name, module in model.named_modules() if name.rpartition(".")[2] in kinds]
    yield
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    asked = parser.parse_args()
    checkpoint = Checkpoint.open(asked.model)
    model = resident(checkpoint)
    corpus = evaluation_windows(read_text(asked.text), checkpoint.codec, asked.window, asked.text.name).first(asked.windows)
    original = [model(window[None]).logits[0].log_softmax(-1) for window in corpus.windows]
    print(f"{asked.model}: {asked.windows} windows of {asked.window} tokens of {asked.text.name}; KL in nats a token, and "
          "the largest difference of a token's log-probability")
    print("| rounded inputs of | " + " | ".join(f"blocks of {block} | largest" for block in BLOCKS) + " |")
    print("|---|" + "---|---|" * len(BLOCKS))
    for kinds in (*((kind,) for kind in KINDS), KINDS):
        cells = []
        for block in BLOCKS:
            kl, largest, tokens = 0.0, 0.0, 0
            with rounding(model, kinds, block):
                for window, before in zip(corpus.windows, original, strict=True):
                    after = model(window[None]).logits[0].log_softmax(-1)
                    kl += float((before.exp() * (before - after)).sum())
                    said = window[1:, None]
                    largest = max(largest, float((before[:-1].gather(1, said) - after[:-1].gather(1, said)).abs().max()))
                    tokens += len(window)
            cells.append(f"{kl / tokens:.5f} | {largest:.3f}")
        print(f"| {kinds[0] if len(kinds) == 1 else 'all'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
