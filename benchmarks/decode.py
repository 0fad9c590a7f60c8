"""Decoding speed in llama.cpp against what memory allows: bandwidth ÷ bytes read for a token, in one run.

    python benchmarks/decode.py --work DIR [--shape llama-3.2-1b] [--grids q4_k,f16] [--threads 1,2] [--model MODEL]

A random checkpoint of a real shape, or with --model a real one, is rounded to each grid (embeddings, which are the head, to
Q6_K, or Q8_0 where that does not fit) and exported; f16 is the checkpoint itself. A token reads every weight once, the tied
embeddings as the head, and the cache of the tokens before it. Bandwidth is that of summing an array of 512 MB, which a core
reads and adds up in a few instructions a line; medians of rounds that take turns with decoding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import gguf
import torch

import tsotsallm
from tsotsallm.api.export import to_gguf
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.llama import Llama
from tsotsallm.evaluation.cost import measure_gguf_speed
from tsotsallm.numerics.ggml import GgmlGrid

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.scale import SHAPES, make_checkpoint

ROUNDS = 5


def bandwidth(threads: int, megabytes: int = 512) -> float:
    """Bytes a second that so many threads read: the best of some sums of a large array."""
    torch.set_num_threads(threads)
    values = torch.ones(megabytes << 17)
    best = 0.0
    for _ in range(7):
        began = time.perf_counter()
        values.sum()
        best = max(best, values.numel() * 4 / (time.perf_counter() - began))
    return best


def bytes_a_token(file: Path, cached: float) -> float:
    """Every tensor but untied embeddings, and the cache of so many tokens."""
    tensors = gguf.GGUFReader(file).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    weights = sum(int(tensor.n_bytes) for tensor in tensors if not (untied and tensor.name == "token_embd.weight"))
    return weights + cached * Llama(file).cache_bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--grids", default="q4_k,f16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    source = asked.model or asked.work / asked.shape
    if not source.exists():
        make_checkpoint(source, SHAPES[asked.shape], None)
    ends, files = GgmlGrid("q6_k").fitting(Checkpoint.open(source).spec.hidden), []
    if ends is None:
        raise SystemExit(f"no grid fits the embeddings of {source}")
    for grid in asked.grids.split(","):
        packed, file = source if grid == "f16" else asked.work / grid, asked.work / f"{grid}.gguf"
        if not packed.exists():
            tsotsallm.compress(source, [{"quantize": {"grid": grid, "method": "rtn", "ends": ends.type}}], packed)
        if not file.exists():
            to_gguf(packed, file, dense="f16" if grid == "f16" else None, verify=False)
        files.append(file)
    print("| file | size | threads | bandwidth | bound | decoded | of the bound |\n|---|---|---|---|---|---|---|")
    for file in files:
        for threads in map(int, asked.threads.split(",")):
            rounds = []
            for _ in range(ROUNDS):
                speed = measure_gguf_speed(file, threads=threads)
                rounds.append((bandwidth(threads), speed.decode_tokens_per_s))
            read = bytes_a_token(file, speed.prompt_tokens + speed.new_tokens / 2)
            wide, decoded = (statistics.median(one) for one in zip(*rounds, strict=True))
            share = statistics.median(tokens * read / rate for rate, tokens in rounds)
            print(f"| {file.name} | {file.stat().st_size / 1e6:.0f} MB | {threads} | {wide / 1e9:.1f} GB/s | "
                  f"{wide / read:.1f} tokens/s | {decoded:.1f} tokens/s | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
