"""Peak memory and time of the main job on random checkpoints of real shapes.

    python benchmarks/scale.py llama-3.2-1b --work /tmp/scale
    python benchmarks/scale.py llama-2-7b --layers 3 --work /tmp/scale

The weights are random (normal, bfloat16), so what is measured is bytes and seconds, not quality. The text is random
words of the random model's own byte-level tokenizer. The job runs in a process of its own, whose peak resident memory
the operating system reports.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tsotsallm.checkpoint.reader import layer_prefix
from tsotsallm.checkpoint.shapes import layer_shapes
from tsotsallm.checkpoint.shards import write_shard
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "llama-2-7b": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}


def make_checkpoint(directory: Path, shape: dict[str, Any], layers: int | None) -> None:
    """Write a random checkpoint layer by layer, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = dict(shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    if layers is not None:
        config["num_hidden_layers"] = layers
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.read(directory)
    torch.manual_seed(0)

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16) * 0.02 if len(size) > 1 else torch.ones(size, dtype=torch.bfloat16)

    weight_map = {}
    for index in range(spec.layers):
        pieces = {layer_prefix(index) + name: weight(*size) for name, size in layer_shapes(spec, index).items()}
        write_shard(directory / f"model-{index:05d}.safetensors", pieces)
        weight_map |= dict.fromkeys(pieces, f"model-{index:05d}.safetensors")
    ends = {EMBEDDING: weight(spec.vocabulary, spec.hidden), FINAL_NORM: weight(spec.hidden)}
    if not spec.tied:
        ends[HEAD] = weight(spec.vocabulary, spec.hidden)
    write_shard(directory / "model-ends.safetensors", ends)
    weight_map |= dict.fromkeys(ends, "model-ends.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = {first + second: len(alphabet) for first, second in [("t", "h")]}      # llama.cpp wants at least one merge
    tokenizer = Tokenizer(models.BPE(vocab={symbol: place for place, symbol in enumerate(alphabet)} | merged,
                                     merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def random_text(path: Path, words: int = 60_000) -> None:
    rng = random.Random(0)
    path.write_text(" ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
                             for _ in range(words)))


def disk_watcher(folder: Path, found: dict[str, int], stop: threading.Event) -> None:
    while not stop.wait(2.0):
        used = 0
        for path in folder.rglob("*"):
            try:
                used += path.stat().st_size if path.is_file() else 0
            except OSError:
                continue
        found["scratch"] = max(found.get("scratch", 0), used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--recipe", default="wanda:2:4, gptq:4")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("scale"))
    parser.add_argument("--keep", action="store_true", help="keep the random checkpoint for another run")
    asked = parser.parse_args()
    name = asked.shape + (f"-{asked.layers}" if asked.layers else "")
    source, out = asked.work / name, asked.work / f"{name}-small"
    if not source.exists():
        building = source.with_name(source.name + ".building")
        shutil.rmtree(building, ignore_errors=True)
        # in a process of its own: a child's peak counts what its parent held when it was started
        code = ("import sys; from pathlib import Path; from scale import SHAPES, make_checkpoint\n"
                "make_checkpoint(Path(sys.argv[1]), SHAPES[sys.argv[2]], int(sys.argv[3]) or None)")
        subprocess.run([sys.executable, "-c", code, str(building.absolute()), asked.shape, str(asked.layers or 0)],
                       cwd=Path(__file__).parent, check=True)
        building.rename(source)
    for leftover in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    text = asked.work / "text.txt"
    random_text(text)
    command = [sys.executable, "-m", "tsotsallm", "compress", str(source), asked.recipe, "-o", str(out),
               "--calibration", str(text), "--windows", str(asked.windows), "--window", str(asked.window), "--json"]
    found: dict[str, int] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=disk_watcher, args=(out.with_name(out.name + ".partial"), found, stop))
    watcher.start()
    began = time.monotonic()
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    elapsed = time.monotonic() - began
    stop.set()
    watcher.join()
    if finished.returncode:
        sys.exit(finished.stdout + finished.stderr)
    result = json.loads(finished.stdout)
    peak = result["peak_rss_bytes"]
    print(json.dumps({
        "shape": name, "recipe": asked.recipe, "tokens": asked.windows * asked.window,
        "peak_rss_gb": round(peak / 1e9, 3), "elapsed_s": round(elapsed, 1), "floor_s": round(result["floor_s"], 1),
        "elapsed_over_floor": round(elapsed / result["floor_s"], 3), "most_bytes_in_partial": found.get("scratch"),
        "bytes": result["bytes"], "result_bytes": result["result_bytes"]}, indent=2))
    shutil.rmtree(out)
    if not asked.keep:
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
