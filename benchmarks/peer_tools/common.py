"""What the scripts of all packages share. They run in the environments of these packages, without TSOTSALLM.

    python with_PACKAGE.py make SOURCE OUT --windows FILE.json --settings JSON      writes the package's own result
    python with_PACKAGE.py dense SOURCE OUT DENSE.safetensors                       writes its values in float32
    python with_PACKAGE.py speed SOURCE OUT                                         prints new tokens per second as JSON

Everything is computed in float32, since a CPU without arithmetic in 16 bits takes hours in it; what is not quantised is
stored in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, NEW, ROUNDS = 32, 32, 3


class Package(Protocol):
    """How a package makes a model and loads what it made."""

    def make(self, source: Path, out: Path, windows: list[list[int]], settings: dict[str, Any]) -> None:
        """Write the result of the package to the directory `out`."""

    def load(self, source: Path, out: Path) -> nn.Module:
        """The result, to compute with on a CPU."""


def original(source: Path) -> tuple[Any, Any]:
    """The original in float32, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


def stored_names(source: Path) -> dict[str, tuple[int, ...]]:
    """Tensor of the original -> its shape."""
    found = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    return found


@torch.no_grad()
def dense_weight(module: nn.Module, columns: int) -> torch.Tensor:
    """The matrix that a linear of any kind multiplies with: what it makes of the unit vectors, (rows, columns) float32."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        try:
            found = module(torch.eye(columns, dtype=dtype))
        except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
            reason = error      # what packages raise for a type that their kernels do not take: the next one is tried
            continue
        return found.float().T.contiguous()
    raise SystemExit(f"{type(module).__name__} multiplies with unit vectors of no type: {reason}")


def write_dense(model: nn.Module, source: Path, out: Path) -> None:
    """Write every tensor of the original as the loaded result has it, in float32."""
    values = {}
    for name, shape in stored_names(source).items():
        module = model.get_submodule(name.removesuffix(".weight"))
        values[name] = dense_weight(module, shape[1]) if name.endswith("_proj.weight") else module.weight.detach().float()
        if tuple(values[name].shape) != shape:
            raise SystemExit(f"{name} is {tuple(values[name].shape)} in the result and {shape} in the original")
    save_file({name: value.contiguous() for name, value in values.items()}, out, metadata={"format": "pt"})


@torch.no_grad()
def decode_speed(model: Any) -> float:
    """New tokens per second of greedy decoding; the median of three rounds, without the prompt's time."""
    prompt = torch.arange(3, 3 + PROMPT).reshape(1, -1)
    rounds = []
    for _ in range(ROUNDS + 1):
        seconds = []
        for new in (1, 1 + NEW):
            began = time.perf_counter()
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=new, max_new_tokens=new,
                           do_sample=False)
            seconds.append(time.perf_counter() - began)
        rounds.append(NEW / (seconds[1] - seconds[0]))
    return statistics.median(rounds[1:])


def halve(out: Path) -> None:
    """Store what a result has in float32, such as embeddings, in float16."""
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        values = load_file(path)
        if any(value.dtype == torch.float32 for value in values.values()):
            halved = {name: value.half() if value.dtype == torch.float32 else value for name, value in values.items()}
            save_file(halved, path, metadata=metadata)
    for path in out.rglob("config.json"):
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"dtype": "float16"}, indent=2), "utf-8")


def run(package: Package) -> None:
    """The command line of a package's script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=("make", "dense", "speed"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("dense", type=Path, nargs="?")
    parser.add_argument("--windows", type=Path)
    parser.add_argument("--settings", type=json.loads)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.manual_seed(0)
    if asked.verb == "make":
        package.make(asked.source, asked.out, json.loads(asked.windows.read_text("utf-8")), asked.settings)
        halve(asked.out)
    elif asked.verb == "dense":
        write_dense(package.load(asked.source, asked.out), asked.source, asked.dense)
    else:
        print(json.dumps({"decode_tokens_per_s": decode_speed(package.load(asked.source, asked.out))}))
